# All 13 LayerNorms out of assets/tiny in 300 steps of 4,096 tokens: about a minute on two cores.
out_dir = "out/remove_ln_tiny"
init_from = "assets/tiny"
dataset = "stdlib"
batch_size = 16
block_size = 256
max_iters = 300
learning_rate = 6e-4
min_lr = 1e-5
warmup_iters = 20
lr_decay_iters = 300
weight_decay = 0.01
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 20, 6),
    ("ln_1qk", 44, 6),
    ("ln_1v", 68, 8),
    ("ln_f", 100, None),
    ("eot", 110, None),
    ("bos", 130, None),
]
eval_interval = 100
eval_iters = 20
log_interval = 10
compile = False
