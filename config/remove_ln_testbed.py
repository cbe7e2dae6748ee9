# The recipe on the testbed's model, on text that it has not seen: what ablations.py compares with.
out_dir = "out/remove_ln_testbed"
init_from = "out/testbed/model"
dataset = "testbed_seen"
seed = 1

# 16 x 256 = 4,096 tokens a step; 300 steps = 1.2 M tokens of 6.7 M
batch_size = 16
block_size = 256
max_iters = 300

learning_rate = 4e-4
min_lr = 1e-5
warmup_iters = 20
lr_decay_iters = 0
weight_decay = 0.01
beta2 = 0.99

ln_schedule = [  # sites, from where to where in the run: remove_ln_tiny.py's, whatever max_iters is
    ("ln_2", (0.03, 0.075), None),
    ("ln_1qk", (0.075, 0.12), None),
    ("ln_1v", (0.12, 0.19), None),
    ("ln_f", 0.195, None),
    ("eot", 0.21, None),
    ("bos", 0.24, None),
]

eval_interval = 150
eval_iters = 20
log_interval = 50
checkpoint_interval = 1000
compile = False
