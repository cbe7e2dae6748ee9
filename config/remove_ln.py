# All 37 LayerNorms out of GPT-2 small: the schedule and the optimiser of arXiv 2409.13710.
# 1,200 steps of 2^19 tokens; on 8 GPUs of 80 GB a micro-batch of 64 sequences is one step's share of a GPU.
out_dir = "out/remove_ln"
init_from = "gpt2"
dataset = "owt"
block_size = 1024
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 1200
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
lr_decay_iters = 2000
weight_decay = 0.1
ln_schedule = [  # kind, first step, steps between layers
    ("ln_2", 200, 20),
    ("ln_1qk", 440, 20),
    ("ln_1v", 680, 30),
    ("ln_f", 1040, None),
    ("eot", 1060, None),
    ("bos", 1160, None),
]
eval_interval = 100
eval_iters = 16
