# All 9 LayerNorms out of assets/tiny, at 13 sites: about a minute and a half on two cores.
out_dir = "out/remove_ln_tiny"
init_from = "assets/tiny"
dataset = "stdlib"
seed = 1  # not pretrain_tiny.py's, whose first batches it would see again

# 16 x 256 = 4,096 tokens a step; 350 steps = 1.4 M tokens
batch_size = 16
block_size = 256
max_iters = 350

learning_rate = 4e-4
min_lr = 1e-5
warmup_iters = 20
lr_decay_iters = 350
weight_decay = 0.01
beta2 = 0.99

# Each kind begins when the one before it has gone through all layers, 0 first (schedule.py: other orders).
ln_schedule = [  # sites, first step, steps between layers
    ("ln_2", 10, 4),      # 4 layers: the last at 10 + 3 x 4 = 22
    ("ln_1qk", 26, 4),    # the last at 26 + 3 x 4 = 38
    ("ln_1v", 42, 6),     # the last at 42 + 3 x 6 = 60
    ("ln_f", 68, None),
    ("eot", 74, None),    # end-of-text tokens lose position 0's constant
    ("bos", 84, None),    # position 0 loses its own: now each site has one constant
]

eval_interval = 50
eval_iters = 20  # x 16 windows of 256 = 82,000 val tokens
log_interval = 10
compile = False  # compiling would take longer than the run
