# All 13 LayerNorms out of assets/tiny in 350 steps of 4,096 tokens: about a minute and a half on two cores.
out_dir = "out/remove_ln_tiny"
init_from = "assets/tiny"
dataset = "stdlib"
seed = 1  # not pretrain_tiny.py's, whose first batches it would see again
batch_size = 16
block_size = 256
max_iters = 350
learning_rate = 4e-4
min_lr = 1e-5
warmup_iters = 20
lr_decay_iters = 350
weight_decay = 0.01
beta2 = 0.99
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 10, 4),
    ("ln_1qk", 26, 4),
    ("ln_1v", 42, 6),
    ("ln_f", 68, None),
    ("eot", 74, None),
    ("bos", 84, None),
]
eval_interval = 50
eval_iters = 20
log_interval = 10
compile = False
