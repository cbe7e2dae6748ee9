# All LayerNorms out of a GPT-2-shaped model of your own, of any depth, in any number of steps:
#
#     python train.py config/remove_ln_mine.py --init_from=path/to/model --dataset=mytext --max_iters=600
#
# The rows say where in the run, so that they follow --max_iters; the order is that of arXiv 2409.13710.
out_dir = "out/remove_ln_mine"

batch_size = 16
block_size = 256  # at most the model's positions
max_iters = 600

learning_rate = 4e-4  # about what the model's own pretraining had, or less
min_lr = 2e-5
warmup_iters = 20
lr_decay_iters = 0  # at max_iters
weight_decay = 0.01

ln_schedule = [  # sites, from where to where in the run
    ("ln_2", (0.03, 0.12), None),
    ("ln_1qk", (0.12, 0.21), None),
    ("ln_1v", (0.21, 0.34), None),
    ("ln_f", 0.35, None),
    ("eot", 0.37, None),
    ("bos", 0.40, None),  # it throws the loss up the most: what is left of the run is for its recovery
]
