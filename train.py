"""
Train GPT-2, and remove its LayerNorms on a schedule.

    python train.py config/remove_ln_tiny.py                        # the LN-free model, on the bundled data and weights
    python train.py config/remove_ln_tiny.py config/control.py      # the same run with its LNs kept: the control
    torchrun --nproc_per_node=8 train.py config/remove_ln.py        # GPT-2 small, data parallel
    python train.py config/remove_ln_tiny.py --init_from=resume     # go on after an interruption
    python train.py config/remove_ln_tiny.py --init_from=auto       # go on if there is a checkpoint, else begin

This file runs from its first line to its last: settings, set-up, loop. A LayerNorm is removed in
one line of the loop, `remove(...)`; what that does is in schedule.py, and what a LayerNorm is in
model.py.
"""
import math
import os
import sys
import time

from parts.errors import UserError, begin_script

begin_script()  # before the slow imports

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure
from model import GPT, GPTConfig
from parts import checkpoint, ranks, run
from parts.data import check_tokens, open_tokens, read_meta, read_windows, train_starts, val_starts
from parts.device import all_finite, autocast_to, check_compiler, keep_memory, pick_device, pick_dtype
from parts.device import flops_per_token, peak_flops
from parts.tokenizer import copy_tokenizer
from schedule import (
    check_modes,
    describe,
    describe_event,
    learning_rate_at,
    remove,
    set_treatments,
    site_name,
    still_far_up,
    timeline,
)

# -----------------------------------------------------------------------------
# settings: a default, and a comment that says what it means; configurator.py checks the bound in it
# files
out_dir = "out/run"  # gets ckpt.pt, model/, log.jsonl and settings.json
force = False  # replace what an earlier run left in out_dir
init_from = "assets/tiny"  # a model directory or hub repository; or scratch; or resume, from out_dir; or auto, as above
dataset = "stdlib"  # a folder under data/, made by prepare_owt.py
seed = 1337  # >= 0 and < 2**63: of the data order, of random weights and of dropout
# removal
ln_schedule = []  # rows (sites, first step, steps between layers), see schedule.py; empty: the control
std_over = "ordinary"  # ordinary or all: whose mean std is the constant; ordinary: neither position 0 nor end-of-text
std_momentum = 0.0  # >= 0 and < 1: of the std's moving average over steps; 0: the mean of the event's own step
# steps
max_iters = 300  # >= 1: steps of the optimizer
batch_size = 16  # >= 1: sequences in a micro-batch
gradient_accumulation_steps = 1  # >= 1: micro-batches in a step, over all processes
block_size = 256  # >= 1: tokens in a sequence
# the model, for init_from=scratch
n_layer = 12  # >= 1: blocks
n_head = 12  # >= 1: attention heads; they divide n_embd
n_embd = 768  # >= 1: width of the residual stream
bias = True  # in LayerNorms and linear maps, as GPT-2 has
dropout = 0.0  # >= 0 and < 1: share of activations that are dropped, in fine-tuning too
gradient_checkpointing = False  # recompute activations in the backward pass: less memory, about a third more time
aux_loss_weight = 0.0  # >= 0: of the squared spread of the std before ln_f (arXiv 2507.02559)
kl_share = 0.0  # >= 0 and <= 1: of KL(teacher || model) in the loss; the rest is the cross-entropy
teacher = ""  # the model with LN that kl_share learns from; "": the one that it starts from
# AdamW
learning_rate = 6e-4  # >= 0: after warmup_iters; then a cosine to min_lr at lr_decay_iters
min_lr = 6e-5  # >= 0: the cosine's floor
warmup_iters = 100  # >= 0: steps
lr_decay_iters = 2000  # >= 0: steps, from the beginning; 0: max_iters
weight_decay = 0.1  # >= 0: of matrices and embeddings
beta1 = 0.9  # >= 0 and < 1: decay of the mean of gradients
beta2 = 0.95  # >= 0 and < 1: decay of the mean of their squares
grad_clip = 1.0  # >= 0: largest norm of the gradient; 0: no clipping
# evaluation, checkpoints and log
eval_interval = 100  # >= 1: steps between evaluations
eval_iters = 20  # >= 1: micro-batches of val windows, spread evenly over the val file
checkpoint_interval = 100  # >= 1: steps between checkpoints; the last step saves one too
keep_checkpoints = 2  # >= 1: how many stay: ckpt.pt, and before it ckpt-1.pt, ...
max_bad_steps = 5  # >= 0: steps in a row with a loss or gradient that is not finite: skipped; one more ends the run
log_interval = 10  # >= 1: steps between printed lines; log.jsonl has every step
wandb_log = False  # log to Weights & Biases too (pip install wandb)
wandb_project = "remove-layernorm"  # its name there
# machine
device = "auto"  # cuda, mps or cpu, the first that is there; or one by name
dtype = "auto"  # auto, float32 or bfloat16: of autocast; auto is bfloat16 where the machine has it
compile = True  # torch.compile: a few minutes once, then faster steps; needs a C++ compiler on a CPU
# -----------------------------------------------------------------------------
settings = configure(globals(), run.without_auto(sys.argv[1:]), __doc__)
if run.asks_auto(sys.argv[1:]) and not force and checkpoint.checkpoint_names(out_dir):
    init_from = "resume"

# --- machine: one process, or torchrun's; rank 0 writes and prints
run.check_out_dir(out_dir, init_from, teacher, force)
lock = run.lock_run(out_dir)  # two runs at a time would mix their files
if compile:
    check_compiler()
if gradient_accumulation_steps % ranks.WORLD:
    n = gradient_accumulation_steps
    divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
    raise UserError(f"gradient_accumulation_steps {n} is not a multiple of {ranks.WORLD} processes: "
                    f"it can be run by {divisors}")
device = pick_device(device)
dtype = pick_dtype(dtype, device)
keep_memory()
autocast = autocast_to(dtype, device)
if device.startswith("cuda"):
    torch.set_float32_matmul_precision("high")  # TF32, where autocast is off
ranks.join(device)
torch.manual_seed(seed)  # the same random weights on every process

# --- model
meta = read_meta(dataset)
settings["data_sha256"] = meta["train"].get("sha256", "")
resumed = None
with ranks.rank_0_first():  # it fetches the weights, and the others find them in the cache
    if init_from == "resume":
        resumed = checkpoint.load(out_dir)
        if run.asks_auto(sys.argv[1:]):  # so that what is asked for is what comes out
            run.refuse_another_run(settings, resumed, out_dir)
        model = checkpoint.load_model(resumed, dropout)
        settings["init_from"] = resumed["settings"]["init_from"]  # not `resume`: eval.py looks for the original
    elif init_from == "scratch":
        if n_embd % n_head:
            raise UserError(f"n_embd {n_embd} is not a multiple of n_head {n_head}")
        vocab_size = -(-meta["vocab_size"] // 64) * 64  # a multiple of 64 is faster, as nanoGPT's 50304
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, meta["eot"]))
    else:
        model = GPT.from_pretrained(init_from, dropout=dropout)
        if model.config.eot != meta["eot"]:
            ranks.say(f"note: end-of-text is {meta['eot']} in data/{dataset}, but {model.config.eot} in {init_from}: "
                      "was it trained on such tokens?")
        model.config.eot = meta["eot"]  # what stands between the documents that it will see
if block_size > model.config.block_size:
    most = model.config.block_size
    raise UserError(f"block_size {block_size} is beyond the model's {most} positions: --block_size={most}")
if ln_schedule and block_size == 1:
    raise UserError("block_size 1 has position 0 alone, and ln_schedule needs the std of others too")
parameters = sum(p.numel() for p in model.parameters())
if settings["device"] == "auto" and device == "cpu" and parameters > 50e6:
    raise UserError(f"{parameters / 1e6:.0f} M parameters, and no GPU: a step would take minutes; "
                    "if that is meant, --device=cpu")
# what the model is, whatever the settings for init_from=scratch say
settings |= {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "bias")}

# --- the model to learn from, which is not trained
if kl_share > 0:
    if settings["init_from"] == "scratch" and not teacher:
        raise UserError("kl_share needs a model to learn from: give --teacher")
    with ranks.rank_0_first():
        teacher = run.model_directory(teacher or settings["init_from"])
        teacher_model = GPT.from_pretrained(teacher)
    teacher_model.to(device).eval().requires_grad_(False)
    if teacher_model.config.vocab_size != model.config.vocab_size:
        raise UserError(f"teacher {teacher} has a vocabulary of {teacher_model.config.vocab_size}, "
                        f"and the model one of {model.config.vocab_size}")
    if teacher_model.config.folded:
        raise UserError(f"teacher {teacher} is folded: name the model with LN")
    if teacher_model.config.block_size < block_size:
        most = teacher_model.config.block_size
        raise UserError(f"block_size {block_size} is beyond the {most} positions of {teacher}")

# --- data: a batch is a function of seed and step, whatever the number of processes
train_tokens = open_tokens(dataset, "train", block_size, model.config.vocab_size)
val_tokens = open_tokens(dataset, "val", block_size, model.config.vocab_size)
with ranks.rank_0_first():
    if ranks.RANK == 0:
        check_tokens(dataset, "train")
        check_tokens(dataset, "val")
tokens_per_step = gradient_accumulation_steps * batch_size * block_size


def batches(step):
    """This process's micro-batches of the step's global batch: x and y (batch_size, block_size)."""
    starts = train_starts(train_tokens, seed, step, gradient_accumulation_steps * batch_size, block_size)
    for i in range(ranks.RANK, gradient_accumulation_steps, ranks.WORLD):
        yield read_windows(train_tokens, starts[i * batch_size : (i + 1) * batch_size], block_size, device)


# --- schedule: the step to begin with, and the model's state there
start = resumed["step"] if resumed else 0
if len(set(ranks.gather(start))) > 1:
    raise UserError(f"the processes find other checkpoints in {out_dir}: it must be the same folder on all machines")
if start > max_iters:
    raise UserError(f"the checkpoint in {out_dir} is at step {start}, beyond max_iters {max_iters}")
events = timeline(ln_schedule, model.config.n_layer, max_iters)
if ln_schedule or (resumed and resumed["settings"]["ln_schedule"]):
    check_modes(model, events, start)
set_treatments(model, events, start)

# --- the run's folder and log
settings["run"] = resumed["settings"].get("run") if resumed else run.identity(settings, model)
wandb = run.start_wandb(wandb_project, out_dir, settings) if wandb_log else None
lock = run.open_run(out_dir, settings, resumed, lock)
log = run.Log(out_dir, start, settings["run"], wandb)

# --- optimizer: a list, as another one can take some of the parameters (Muon the block matrices, say)
model.to(device)
model.gradient_checkpointing = gradient_checkpointing
matrices = [p for p in model.parameters() if p.dim() >= 2]  # and embeddings
vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and LNs
groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)]
torch.manual_seed(seed + ranks.RANK)  # another dropout on every process
if resumed:
    checkpoint.load_optimizers(optimizers, resumed)
    checkpoint.set_rng_state(resumed["rng"])
    changed = run.changed_settings(settings, resumed)
    if changed:
        ranks.say(f"note: not as in the checkpoint: {changed}")

# --- compiled and data parallel; removal switches the raw model, whose tensors these wrappers share
compiled = model.compiled() if compile else model
if compile and kl_share > 0:
    teacher_model.hidden = torch.compile(teacher_model.hidden)
forward = compiled
if ranks.WORLD > 1:
    gpus = [ranks.LOCAL_RANK] if device.startswith("cuda") else None
    # no buffers to send: every process sets the same constants and modes
    forward = DDP(compiled, device_ids=gpus, forward_sync_buffers=False)


@torch.no_grad()
def evaluate():
    """Mean loss in nats per token, over the same val windows each time."""
    model.eval()
    starts = val_starts(val_tokens, eval_iters * batch_size, block_size)
    total = torch.zeros((), device=device)
    for i in range(ranks.RANK * batch_size, len(starts), ranks.WORLD * batch_size):
        x, y = read_windows(val_tokens, starts[i : i + batch_size], block_size, device)
        with autocast:
            _, loss = compiled(x, y, loss_only=True)
        total += loss * len(x)
    model.train()
    return (ranks.mean(total) * ranks.WORLD / len(starts)).item()


def stop(what):
    """End the run, whose numbers are no numbers any more; its checkpoints are from before."""
    bar.close()
    ranks.leave()
    past = [(at, site_name(kind, layer)) for at, kind, layer in events if at <= step]
    last = f"{past[-1][1]} was removed before step {past[-1][0]}" if past else "no LayerNorm was removed yet"
    raise UserError(f"step {step}: {what}; {last}. {run.what_is_kept(out_dir)}, "
                    "with a lower learning_rate, or more steps between the events of ln_schedule")


def save():
    """A checkpoint of the model before this step, but never of numbers that are none."""
    if not all_finite(model):
        stop("a weight or constant is no finite number")
    checkpoint.save(out_dir, step, model, optimizers, settings)


# --- the loop
ranks.say(f"{parameters / 1e6:.2f} M parameters from {init_from}, {ranks.WORLD} x {device}, {dtype}, "
          f"{tokens_per_step:,} tokens a step, steps {start} to {max_iters}")
ranks.say(f"val loss over {len(val_starts(val_tokens, eval_iters * batch_size, block_size)):,} windows "
          f"of the {(len(val_tokens) - 1) // block_size:,} there are")
for line in describe(ln_schedule, events):
    ranks.say(line)
flops_per_step = tokens_per_step * flops_per_token(model, block_size)
peak = peak_flops(device, dtype) * ranks.WORLD
micro_steps = gradient_accumulation_steps // ranks.WORLD
columns = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # 80 hold them all
bar = tqdm(total=max_iters, initial=start, bar_format=columns, disable=None if ranks.RANK == 0 else True)
model.train()
interruption = None  # until there is a step to save
losses = {}  # of each step
bad_steps = 0  # in a row

for step in range(start, max_iters + 1):
    if interruption and interruption.on_any_rank(device):
        save()
        bar.close()
        interruption.exit(f"stopped at step {step}, saved to {out_dir}/ckpt.pt; "
                          f"go on with: {run.resume_command()}")

    # once in a while: the val loss; a checkpoint
    if step % eval_interval == 0 or step == max_iters:
        val_loss = evaluate()
        if not math.isfinite(val_loss):
            stop(f"the val loss is {val_loss}")
        log.write(dict(step=step, val_loss=val_loss))
        ranks.say(f"step {step:>6}  val loss {val_loss:.4f}")
    if step > start and (step % checkpoint_interval == 0 or step == max_iters):
        save()
    if step == max_iters:
        break

    # the removal: before the step's forward pass, on its own batches
    began = time.perf_counter()
    with autocast:
        ids = (x for x, _ in batches(step))
        removed = remove(model, events, step, ids, ranks.mean, std_over, std_momentum)
    for entry in removed:
        log.write(entry)
        ranks.say(f"step {step:>6}  " + describe_event(entry))

    # the step
    lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    step_losses = torch.zeros(2, device=device)  # cross-entropy, KL
    for i, (x, y) in enumerate(batches(step)):
        if ranks.WORLD > 1:  # gradients are averaged once, with the last micro-batch
            forward.require_backward_grad_sync = i == micro_steps - 1
        with autocast:
            told = (teacher_model.hidden(x), teacher_model.lm_head.weight, kl_share) if kl_share > 0 else None
            _, loss, *more = forward(x, y, loss_only=True, with_spread=aux_loss_weight > 0, teacher=told)
        terms = more[0] if more else {}
        objective = loss + aux_loss_weight * terms.get("spread", 0.0)
        (objective / micro_steps).backward()
        step_losses[0] += terms.get("ce", loss).detach() / micro_steps
        step_losses[1] += terms.get("kl", 0.0) / micro_steps
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    # `loss` is the cross-entropy, whatever else is learned from
    loss, kl, norm = ranks.mean(torch.stack([*step_losses, norm])).tolist()
    bad = not (math.isfinite(loss) and math.isfinite(norm))
    bad_steps = bad_steps + 1 if bad else 0
    if bad_steps > max_bad_steps:
        stop(f"the loss is {loss} and the gradient's norm {norm}, not finite for {bad_steps} steps in a row")
    if not bad:
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad(set_to_none=True)

    # the log
    losses[step] = loss
    if bad:
        ranks.say(f"step {step:>6}  skipped: the loss is {loss}, the gradient's norm {norm}")
        log.write(dict(step=step, loss=None, skipped=True))
        bar.update()
        continue
    seconds = time.perf_counter() - began
    speed, mfu = tokens_per_step / seconds, flops_per_step / seconds / peak
    other = dict(kl=kl) if kl_share > 0 else {}
    log.write(dict(step=step, loss=loss, **other, lr=lr, tokens_per_s=round(speed), mfu=round(mfu, 4)))
    far_up = still_far_up(losses, events, step)
    if far_up:
        ranks.say(far_up)
    bar.update()
    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}")
    if bar.disable and step % log_interval == 0:
        ranks.say(f"step {step:>6}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s  MFU {mfu:.0%}")
    interruption = interruption or ranks.Interruption()

bar.close()
if ranks.RANK == 0:
    model.save_pretrained(os.path.join(out_dir, "model"))
    if settings["init_from"] != "scratch":
        copy_tokenizer(settings["init_from"], os.path.join(out_dir, "model"))
    elif os.path.isdir(meta.get("tokenizer", "")):
        copy_tokenizer(meta["tokenizer"], os.path.join(out_dir, "model"))
    fake = list(model.ln_modes().values()).count("fake")
    ranks.say(f"{out_dir}/model: " + ("LN-free" if model.ln_free() else f"{fake} of {len(model.sites())} sites fake"))
    ranks.say("next: " + run.next_command(settings, fake > 0))
ranks.leave()
