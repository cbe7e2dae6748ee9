# All 49 LayerNorms out of GPT-2 medium, at 73 sites, in 500 steps: arXiv 2507.02559.
out_dir = "out/remove_ln_medium"
init_from = "gpt2-medium"
dataset = "owt"

# 32 x 16 x 1,024 = 2**19 tokens a step; 500 steps = 0.26 B tokens
batch_size = 32  # for a GPU of 80 GB
gradient_accumulation_steps = 16
block_size = 1024
max_iters = 500

learning_rate = 6e-4
min_lr = 3e-4
warmup_iters = 10
lr_decay_iters = 500
weight_decay = 0.01
beta2 = 0.999
dropout = 0.1
std_over = "all"  # no constant of its own for position 0 or end-of-text, so no rows eot and bos
aux_loss_weight = 0.1

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 20, 2),          # 24 layers: the last at 20 + 23 x 2 = 66
    ("ln_1qk", 68, 2),        # the last at 68 + 23 x 2 = 114
    ("ln_1v", 116, 3),        # the last at 116 + 23 x 3 = 185
    ("ln_f", 188, None),
]

eval_interval = 100
eval_iters = 32  # x 32 windows of 1,024 = 2**20 val tokens
