# The testbed's model: a GPT-2 of 2.6 M parameters on the source code of Python packages. `make testbed`
# makes its text; the run sees less than half of it.
out_dir = "out/testbed"
init_from = "scratch"
dataset = "testbed_pretrain"
n_layer = 4
n_head = 6
n_embd = 192

# 32 x 256 = 8,192 tokens a step; 2,000 steps = 16 M tokens
batch_size = 32
block_size = 256
max_iters = 2000

learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 200
lr_decay_iters = 2000
beta2 = 0.99

eval_interval = 400
eval_iters = 20
log_interval = 50
compile = False
