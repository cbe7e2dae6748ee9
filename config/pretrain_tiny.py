# assets/tiny: a GPT-2 of 1.9 M parameters on bytes of Python's standard library, from random weights. Its data are one
# half of the library's files; the demo fine-tunes on the other half. Some 40 minutes on two busy cores.
out_dir = "out/pretrain_tiny"
init_from = "scratch"
dataset = "stdlib_pretrain"
n_layer = 4
n_head = 6
n_embd = 192

# 32 x 256 = 8,192 tokens a step; 1,500 steps = 12 M tokens
batch_size = 32
block_size = 256
max_iters = 1500

learning_rate = 2e-3
min_lr = 2e-5
warmup_iters = 200
lr_decay_iters = 3000  # stopped before the cosine reaches its floor: like GPT-2, it can still learn when it is fine-tuned
weight_decay = 0.1
beta2 = 0.99

eval_interval = 500
eval_iters = 30  # x 32 windows of 256 = 246,000 val tokens
log_interval = 50
