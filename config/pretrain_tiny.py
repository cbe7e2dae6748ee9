# assets/tiny: a GPT-2 of 1.9 M parameters on bytes of Python's standard library, from random weights. Its data are one half
# of the library's files; the demo fine-tunes on the other half. About an hour on two cores.
out_dir = "out/pretrain_tiny"
init_from = "scratch"
dataset = "stdlib_pretrain"
n_layer = 4
n_head = 6
n_embd = 192

# 32 x 256 = 8,192 tokens a step; 3,000 steps = 25 M tokens
batch_size = 32
block_size = 256
max_iters = 3000

learning_rate = 2e-3
min_lr = 2e-5
warmup_iters = 200
lr_decay_iters = 3000
weight_decay = 0.1
beta2 = 0.99

eval_interval = 500
eval_iters = 30  # x 32 windows of 256 = 246,000 val tokens
log_interval = 50
