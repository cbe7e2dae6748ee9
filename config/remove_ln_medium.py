# All 73 LayerNorms out of GPT-2 medium in 500 steps of 2^19 tokens: arXiv 2507.02559.
out_dir = "out/remove_ln_medium"
init_from = "gpt2-medium"
dataset = "owt"
block_size = 1024
batch_size = 32  # for a GPU of 80 GB
gradient_accumulation_steps = 16
max_iters = 500
learning_rate = 0.0006
min_lr = 0.0003
warmup_iters = 10
lr_decay_iters = 500
weight_decay = 0.01
aux_loss_weight = 0.1
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 20, 2),
    ("ln_1qk", 68, 2),
    ("ln_1v", 116, 3),
    ("ln_f", 188, None),
    ("eot", 190, None),
    ("bos", 200, None),
]
eval_interval = 100
eval_iters = 32
