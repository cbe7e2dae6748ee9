# All 73 LayerNorms out of GPT-2 large, at 109 sites, in 600 steps: arXiv 2507.02559.
out_dir = "out/remove_ln_large"
init_from = "gpt2-large"
dataset = "owt"

# 16 x 32 x 1,024 = 2**19 tokens a step; 600 steps = 0.31 B tokens
batch_size = 16  # for a GPU of 80 GB
gradient_accumulation_steps = 32
block_size = 1024
max_iters = 600

learning_rate = 3e-4
min_lr = 4e-5
warmup_iters = 15
lr_decay_iters = 1200  # stopped at 600, where it was best
weight_decay = 0.01
beta2 = 0.999
dropout = 0.1
std_over = "all"  # no constant of its own for position 0 or end-of-text, so no rows eot and bos
aux_loss_weight = 0.03

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 30, 4),          # 36 layers: the last at 30 + 35 x 4 = 170
    ("ln_1qk", 174, 4),       # the last at 174 + 35 x 4 = 314
    ("ln_1v", 318, 6),        # the last at 318 + 35 x 6 = 528
    ("ln_f", 534, None),
]

eval_interval = 100
eval_iters = 64  # x 16 windows of 1,024 = 2**20 val tokens
