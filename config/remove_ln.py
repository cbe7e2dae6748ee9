# All 25 LayerNorms out of GPT-2 small, at 37 sites: the schedule and the optimiser of arXiv 2409.13710.
out_dir = "out/remove_ln"
init_from = "gpt2"
dataset = "owt"

# 64 x 8 x 1,024 = 2**19 tokens a step; 1,200 steps = 0.63 B tokens
batch_size = 64  # for a GPU of 80 GB: one micro-batch for each of 8
gradient_accumulation_steps = 8
block_size = 1024
max_iters = 1200

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
lr_decay_iters = 2000  # stopped before the cosine reaches its floor
weight_decay = 0.1

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 200, 20),        # 12 layers: the last at 200 + 11 x 20 = 420
    ("ln_1qk", 440, 20),      # the last at 440 + 11 x 20 = 660
    ("ln_1v", 680, 30),       # the last at 680 + 11 x 30 = 1010
    ("ln_f", 1040, None),
    ("eot", 1060, None),      # end-of-text tokens lose position 0's constant
    ("bos", 1160, None),      # position 0 loses its own: now each site has one constant
]

eval_interval = 100
eval_iters = 16  # x 64 windows of 1,024 = 2**20 val tokens
