# All 145 LayerNorms out of GPT-2 XL in 800 steps of 2^19 tokens: arXiv 2507.02559, stopped at 800 of the cosine's 1,200, where it was best.
out_dir = "out/remove_ln_xl"
init_from = "gpt2-xl"
dataset = "owt"
block_size = 1024
batch_size = 8  # for a GPU of 80 GB
gradient_accumulation_steps = 64
max_iters = 800
learning_rate = 0.0001
min_lr = 2e-05
warmup_iters = 20
lr_decay_iters = 1200
weight_decay = 0.01
aux_loss_weight = 0.01
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 20, 2),
    ("ln_1qk", 116, 2),
    ("ln_1v", 212, 3),
    ("ln_f", 356, None),
    ("eot", 358, None),
    ("bos", 368, None),
]
eval_interval = 100
eval_iters = 128
