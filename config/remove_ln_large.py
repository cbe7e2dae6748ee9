# All 109 LayerNorms out of GPT-2 large in 600 steps of 2^19 tokens: arXiv 2507.02559, stopped at 600 of the cosine's 1,200, where it was best.
out_dir = "out/remove_ln_large"
init_from = "gpt2-large"
dataset = "owt"
block_size = 1024
batch_size = 16  # for a GPU of 80 GB
gradient_accumulation_steps = 32
max_iters = 600
learning_rate = 0.0003
min_lr = 4e-05
warmup_iters = 15
lr_decay_iters = 1200
weight_decay = 0.01
aux_loss_weight = 0.03
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 30, 4),
    ("ln_1qk", 174, 4),
    ("ln_1v", 318, 6),
    ("ln_f", 534, None),
    ("eot", 536, None),
    ("bos", 546, None),
]
eval_interval = 100
eval_iters = 64
