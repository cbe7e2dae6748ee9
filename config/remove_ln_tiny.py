# All 9 LayerNorms out of assets/tiny, at 13 sites: one to three minutes on one core.
out_dir = "out/remove_ln_tiny"
init_from = "assets/tiny"
dataset = "stdlib"  # the half of the standard library's files that assets/tiny has not seen
seed = 1

# 16 x 256 = 4,096 tokens a step; 120 steps = 0.5 M tokens
batch_size = 16
block_size = 256
max_iters = 120

learning_rate = 4e-4
min_lr = 1e-5
warmup_iters = 10
lr_decay_iters = 120
weight_decay = 0.01
beta2 = 0.99

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 4, 2),       # 4 layers: the last at 4 + 3 x 2 = 10
    ("ln_1qk", 12, 2),    # the last at 12 + 3 x 2 = 18
    ("ln_1v", 20, 3),     # the last at 20 + 3 x 3 = 29
    ("ln_f", 32, None),
    ("eot", 35, None),    # end-of-text tokens lose position 0's constant
    ("bos", 40, None),    # position 0 loses its own: now each site has one constant
]

eval_interval = 40
eval_iters = 20  # x 16 windows of 256 = 82,000 val tokens
log_interval = 10
compile = False  # compiling would take longer than the run
