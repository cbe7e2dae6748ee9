# All 97 LayerNorms out of GPT-2 XL, at 145 sites, in 800 steps: arXiv 2507.02559.
out_dir = "out/remove_ln_xl"
init_from = "gpt2-xl"
dataset = "owt"

# 8 x 64 x 1,024 = 2**19 tokens a step; 800 steps = 0.42 B tokens
batch_size = 8  # for a GPU of 80 GB
gradient_accumulation_steps = 64
block_size = 1024
max_iters = 800

learning_rate = 1e-4
min_lr = 2e-5
warmup_iters = 20
lr_decay_iters = 1200  # stopped at 800, where it was best
weight_decay = 0.01
beta2 = 0.999
dropout = 0.1
std_over = "all"  # no constant of its own for position 0 or end-of-text, so no rows eot and bos
aux_loss_weight = 0.01

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 50, 4),          # 48 layers: the last at 50 + 47 x 4 = 238
    ("ln_1qk", 242, 4),       # the last at 242 + 47 x 4 = 430
    ("ln_1v", 434, 6),        # the last at 434 + 47 x 6 = 716
    ("ln_f", 722, None),
]

eval_interval = 100
eval_iters = 128  # x 8 windows of 1,024 = 2**20 val tokens
