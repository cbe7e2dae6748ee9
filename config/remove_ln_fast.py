# All 37 LayerNorms out of GPT-2 small in 300 steps of 2^19 tokens: arXiv 2507.02559.
out_dir = "out/remove_ln_fast"
init_from = "gpt2"
dataset = "owt"
block_size = 1024
batch_size = 64  # for a GPU of 80 GB
gradient_accumulation_steps = 8
max_iters = 300
learning_rate = 0.0006
min_lr = 0.0003
warmup_iters = 25
lr_decay_iters = 300
weight_decay = 0.01
aux_loss_weight = 0.1
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 20, 2),
    ("ln_1qk", 44, 2),
    ("ln_1v", 68, 3),
    ("ln_f", 104, None),
    ("eot", 106, None),
    ("bos", 116, None),
]
eval_interval = 100
eval_iters = 16
