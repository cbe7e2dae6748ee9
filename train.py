"""
Train GPT-2, and remove its LayerNorms on a schedule.

    python train.py config/remove_ln_tiny.py                        # the LN-free model, on the bundled data and weights
    python train.py config/remove_ln_tiny.py config/control.py      # its control: the same run with the LNs kept
    torchrun --nproc_per_node=8 train.py config/remove_ln.py        # GPT-2 small, data parallel
    python train.py config/remove_ln_tiny.py --init_from=resume     # continue after an interruption
    python train.py config/remove_ln_tiny.py --init_from=auto       # continue if there is a checkpoint, else start

Config files come first; they are Python code and are executed. Then come flags.

This file runs from its first line to its last: settings, set-up, objective, loop. A LayerNorm is removed in one line of
the loop, `remove(...)`: schedule.py has it, and model.py has the LayerNorm.
"""
import math
import os
import secrets
import sys
import time

from parts.errors import UserError, begin_script, say_next

begin_script()  # before the slow imports

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure
from model import GPT, GPTConfig, std_of
from parts import checkpoint, ranks, run
from parts.data import check_tokens, open_tokens, read_meta, read_windows, train_starts, val_starts
from parts.device import all_finite, autocast_to, check_compiler, keep_memory, pick_device, pick_dtype
from parts.device import flops_per_token, peak_flops
from parts.loss import LossInPieces
from parts.tokenizer import check_data, copy_tokenizer
from schedule import check_modes, describe, describe_event, learning_rate_at, remove, set_treatments, site_name
from schedule import still_far_up, timeline

# -----------------------------------------------------------------------------
# settings: a default, and what it means
# files
out_dir = "out/run"  # gets ckpt.pt, model/, log.jsonl and settings.json
force = False  # replace what an earlier run left in out_dir
init_from = "assets/tiny"  # a model directory or hub repository; scratch; resume, from out_dir; or auto
auto = False  # resume if out_dir has a checkpoint; init_from=auto sets it, and leaves init_from as it was
dataset = "stdlib"  # a folder in data/, made by prepare_owt.py
any_tokenizer = False  # train on tokens of another tokenizer than the model's
seed = 1337  # seeds the data order, random weights and dropout
# removal
ln_schedule = []  # rows (sites, first step, steps between layers), see schedule.py; empty: the control
std_over = "ordinary"  # tokens whose mean std is the constant: ordinary (not position 0, not end-of-text) or all
std_momentum = 0.0  # momentum of a moving average of the std over steps; 0: only the event's own step
# steps
max_iters = 300  # steps of the optimizer
batch_size = 16  # sequences in a micro-batch
gradient_accumulation_steps = 1  # micro-batches in a step, over all ranks
block_size = 256  # tokens in a sequence
# the model, for init_from=scratch
n_layer = 12  # blocks
n_head = 12  # attention heads; must divide n_embd
n_embd = 768  # width of the residual stream
bias = True  # in LayerNorms and linear maps, as GPT-2 has
# loss and regularisation
dropout = 0.0  # in fine-tuning too
gradient_checkpointing = False  # recompute activations in the backward pass: less memory, about a third more time
aux_loss_weight = 0.0  # weight of the squared spread of the std before ln_f (arXiv 2507.02559)
kl_share = 0.0  # weight of KL(teacher || model) in the loss, 0 to 1; the cross-entropy has 1 - kl_share
hidden_weight = 0.0  # weight of the distance to the teacher's residual stream after each block
noise_share = 0.0  # share of a micro-batch's sequences that are random tokens, learned from the teacher alone
teacher = ""  # the model with LN for kl_share; "": the model that the run starts from
# AdamW
learning_rate = 6e-4  # after warmup_iters; then a cosine to min_lr at lr_decay_iters
min_lr = 6e-5  # the cosine's floor
warmup_iters = 100  # steps
lr_decay_iters = 2000  # steps, from the beginning; 0: max_iters
weight_decay = 0.1  # applied to matrices and embeddings
beta1 = 0.9  # decay of the mean of gradients
beta2 = 0.95  # decay of the mean of squared gradients
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
# evaluation, checkpoints and log
eval_interval = 100  # steps between evaluations
eval_iters = 20  # micro-batches of val windows, spread evenly over the val file
checkpoint_interval = 100  # steps between checkpoints; the last step saves one too
max_bad_steps = 5  # steps in a row that may be skipped because loss or gradient is not finite
log_interval = 10  # steps between printed lines; log.jsonl has every step
wandb_log = False  # log to Weights & Biases too (pip install wandb)
wandb_project = "remove-layernorm"  # its name there
# machine
device = "auto"  # the first of cuda, mps and cpu that is there; or a device's name
dtype = "auto"  # autocast dtype: float32, bfloat16, or auto: bfloat16 where the machine computes with it
compile = True  # torch.compile: some minutes once, then faster steps; it needs a C++ compiler
# -----------------------------------------------------------------------------
at_least_1 = dict.fromkeys(("max_iters", "batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head",
                            "n_embd", "eval_interval", "eval_iters", "checkpoint_interval", "log_interval"), 1)
choices = dict(std_over=("ordinary", "all"), dtype=("auto", "float32", "bfloat16"))
below = dict(seed=2**63, noise_share=1, std_momentum=1, dropout=1, beta1=1, beta2=1)
names = configure(globals(), sys.argv[1:], __doc__, at_least_1, dict(kl_share=1), below, choices, configs=True)

# --- machine: one process, or torchrun's; rank 0 writes and prints
out_dir = out_dir.rstrip("/")
auto = auto and init_from != "resume" and not force and bool(checkpoint.found(out_dir))
resuming = auto or init_from == "resume"
run.check_out_dir(out_dir, "resume" if resuming else init_from, teacher, force)
lock = run.lock_run(out_dir)  # two runs at a time would mix their files
if gradient_accumulation_steps % ranks.WORLD:
    n = gradient_accumulation_steps
    divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
    raise UserError(f"gradient_accumulation_steps {n} is not a multiple of {ranks.WORLD} ranks: "
                    f"choose {divisors} ranks")
machine = pick_device(device)
autocast = autocast_to(pick_dtype(dtype, machine), machine)
keep_memory()
if machine.startswith("cuda"):
    torch.set_float32_matmul_precision("high")  # TF32, where autocast is off
ranks.join(machine)
torch.manual_seed(seed)  # the same random weights on every rank

# --- model
meta = read_meta(dataset)
resumed, start = None, 0
with ranks.rank_0_first():  # rank 0 downloads, the others find the files in the cache
    if resuming:
        model, resumed = checkpoint.load(out_dir, dropout)
        start = resumed["step"]
    elif init_from == "scratch":
        if n_embd % n_head:
            raise UserError(f"n_embd {n_embd} is not a multiple of n_head {n_head}")
        vocab_size = -(-meta["vocab_size"] // 64) * 64  # a multiple of 64 is faster, as nanoGPT's 50304
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, meta["eot"]))
    else:
        model = GPT.from_pretrained(init_from, dropout=dropout)
        note = check_data(dataset, meta, model, init_from, any_tokenizer)
        if note:
            ranks.say(note)
        model.config.eot = meta["eot"]  # it stands between the documents that the model will see
if init_from == "resume":
    init_from = resumed["settings"]["init_from"]
# the settings in force, whatever those of init_from=scratch say
n_layer, n_head, n_embd, bias = (getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "bias"))
settings = {name: globals()[name] for name in names} | dict(data_sha256=meta["train"].get("sha256", ""))
if auto:
    run.refuse_another_run(settings, resumed, out_dir)
if block_size > model.config.block_size:
    most = model.config.block_size
    raise UserError(f"block_size {block_size} is beyond the model's {most} positions: --block_size={most}")
for what in ("teacher", "hidden_weight", "noise_share"):
    if globals()[what] and kl_share == 0:
        raise UserError(f"{what} {globals()[what]} does nothing with kl_share 0: give a --kl_share too")
noise = round(noise_share * batch_size)  # sequences of a micro-batch
if noise_share > 0 and not 0 < noise < batch_size:
    raise UserError(f"noise_share {noise_share} of batch_size {batch_size} is {noise} sequences: change one of the "
                    "two, so that there is at least one sequence of noise and one of text")
if ln_schedule and block_size == 1:
    raise UserError("block_size 1 has only position 0, and ln_schedule needs the std of others too")
parameters = sum(p.numel() for p in model.parameters())
if compile and parameters < 5e6 and not any(arg.startswith("--compile") for arg in sys.argv):
    ranks.say("not compiled: for so small a model that takes longer than it saves; --compile compiles all the same")
    compile = False
if compile:
    check_compiler()
    ranks.say("torch.compile: the first step takes a minute or more")
if device == "auto" and machine == "cpu" and parameters > 50e6:
    raise UserError(f"{parameters / 1e6:.0f} M parameters and no GPU: a step would take minutes; "
                    "if you mean it, --device=cpu")

# --- the teacher, which is not trained
teacher_model = None
if kl_share > 0:
    with ranks.rank_0_first():
        teacher_model = run.load_teacher(teacher or init_from, model, block_size).to(machine)
    shape = teacher_model.config.n_layer, teacher_model.config.n_embd
    if hidden_weight > 0 and shape != (n_layer, n_embd):
        raise UserError(f"hidden_weight needs a teacher of the model's shape, {n_layer} layers of width {n_embd}: "
                        f"{teacher} has {shape[0]} of {shape[1]}")
    if kl_share == 1 and not teacher:
        ranks.say("note: with kl_share 1 and itself as the teacher, the model starts where the loss is least: until "
                  "the first removal, AdamW scales rounding noise to full steps")

# --- data: a batch is a function of seed and step, whatever the number of ranks
train_tokens = open_tokens(dataset, "train", block_size, model.config.vocab_size)
val_tokens = open_tokens(dataset, "val", block_size, model.config.vocab_size)
with ranks.rank_0_first():
    if ranks.RANK == 0:
        check_tokens(dataset, "train")
        check_tokens(dataset, "val")
tokens_per_step = gradient_accumulation_steps * batch_size * block_size


def batches(step):
    """This rank's micro-batches of the step's global batch: inputs and targets (batch_size, block_size). Sequences of
    noise come first; their targets are -1."""
    starts = train_starts(train_tokens, seed, step, gradient_accumulation_steps * batch_size, block_size)
    for i in range(ranks.RANK, gradient_accumulation_steps, ranks.WORLD):
        x, y = read_windows(train_tokens, starts[i * batch_size + noise : (i + 1) * batch_size], block_size, machine)
        random = np.random.default_rng([seed, step, i]).integers(meta["vocab_size"], size=(noise, block_size))
        random = torch.from_numpy(random).to(machine)
        yield torch.cat([random, x]), torch.cat([torch.full_like(random, -1), y])


def ids(step):
    """The inputs of batches(step), without noise."""
    return (x[noise:] for x, _ in batches(step))


# --- schedule: the first step, and the model's state there
if len(set(ranks.gather(start))) > 1:
    raise UserError(f"ranks see different checkpoints: out_dir {out_dir} must be on a shared file system")
if start > max_iters:
    raise UserError(f"the checkpoint in {out_dir} is at step {start}, beyond max_iters {max_iters}")
events = timeline(ln_schedule, n_layer, max_iters)
if ln_schedule or (resumed and resumed["settings"]["ln_schedule"]):
    check_modes(model, events, start)
set_treatments(model, events, start)

# --- the run's folder and log
if wandb_log:
    settings["wandb_id"] = (resumed and resumed["settings"].get("wandb_id")) or secrets.token_hex(8)
wandb = run.start_wandb(wandb_project, out_dir, settings) if wandb_log else None
lock = run.open_run(out_dir, settings, resumed, lock)
log = run.Log(out_dir, start, wandb)

# --- optimizers: a list, so that another one can take some of the parameters (Muon the block matrices, say)
model.to(machine)
model.gradient_checkpointing = gradient_checkpointing
matrices = [p for p in model.parameters() if p.dim() >= 2]  # and embeddings
vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and LNs
groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)]
torch.manual_seed(seed + ranks.RANK)  # every rank has its own dropout
if resumed:
    checkpoint.load_optimizers(optimizers, resumed, out_dir)
    checkpoint.set_rng_state(resumed["rng"])
    changed = run.changed_settings(settings, resumed, ("out_dir", "auto", "force"))
    if changed:
        ranks.say(f"note: settings differ from the checkpoint's: {changed}")

# --- compiled and data parallel; removal switches the raw model, whose tensors these wrappers share
forward = compiled = torch.compile(model) if compile else model
teacher_forward = torch.compile(teacher_model) if compile and teacher_model else teacher_model
if ranks.WORLD > 1:
    gpus = [ranks.LOCAL_RANK] if machine.startswith("cuda") else None
    # no buffers to send: every rank sets the same constants and modes
    forward = DDP(compiled, device_ids=gpus, forward_sync_buffers=False)


# -----------------------------------------------------------------------------
# the objective: what is learned from


def of_logits(logits, targets, teacher_logits):
    """Losses of the logits: logits and, with a teacher, teacher_logits (rows, vocab), targets (rows,) -> the loss, and
    the named terms for the log; sums over the rows, in nats. LossInPieces calls it for some rows at a time, and finds
    its gradient by autograd. In bfloat16 each row of logits is shifted by a constant: use only their softmax."""
    log_p = logits.log_softmax(-1)
    loss = F.nll_loss(log_p, targets, ignore_index=-1, reduction="sum")  # the cross-entropy
    if teacher_logits is None:
        return loss, dict(loss=loss)
    log_q = teacher_logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)  # KL(teacher || model)
    kl_of_text = kl.masked_fill(targets == -1, 0).sum()
    return (1 - kl_share) * loss + kl_share * kl.sum(), dict(loss=loss, kl=kl_of_text)


in_pieces = LossInPieces(of_logits, model.lm_head, teacher_model and teacher_model.lm_head, compile)


def objective(x, y):
    """Inputs and targets (B, T) -> the scalar to minimize, in nats per token, and its terms by name. Add a
    loss on the residual stream or on weights here, and one on logits in of_logits: log.jsonl has every term, averaged
    over the step. The term "loss" is the cross-entropy."""
    # the residual stream after each block, and what the unembedding reads, (B, T, C) each
    streams, hidden = forward(x, streams=True)
    taught, teacher_hidden = ([], None) if teacher_forward is None else teacher_forward(x, streams=True)
    objective, terms = in_pieces(hidden, y, teacher_hidden)
    if hidden_weight > 0:
        errors = [(ours - its).square().sum(-1) / its.square().sum(-1) for ours, its in zip(streams, taught)]
        terms["hidden"] = torch.stack(errors).mean()  # relative to the teacher's stream, over blocks and tokens
        objective = objective + hidden_weight * terms["hidden"]
    if aux_loss_weight > 0:  # penalizes the spread of the std before ln_f around its mean (arXiv 2507.02559)
        std = std_of(streams[-1], model.config.ln_eps).squeeze(-1)  # (B, T)
        ordinary = model.ordinary(x)
        target = (std * ordinary).sum() / ordinary.sum().clamp(min=1)
        terms["spread"] = (std - target.detach()).square().mean()
        objective = objective + aux_loss_weight * terms["spread"]
    return objective, terms


# -----------------------------------------------------------------------------
# the loop


@torch.no_grad()
def evaluate():
    """Mean cross-entropy in nats per token, over the same val windows each time."""
    model.eval()
    starts = val_starts(val_tokens, eval_iters * batch_size, block_size)
    total = torch.zeros((), device=machine)
    for i in range(ranks.RANK * batch_size, len(starts), ranks.WORLD * batch_size):
        x, y = read_windows(val_tokens, starts[i : i + batch_size], block_size, machine)
        with autocast:
            _, hidden = compiled(x, streams=True)
            loss, _ = in_pieces(hidden, y)
        total += loss * len(x)
    model.train()
    return (ranks.mean(total) * ranks.WORLD / len(starts)).item()


def stop(what):
    """End the run because of NaN or inf. Its checkpoints are from before."""
    bar.close()
    ranks.leave()
    past = [(at, site_name(kind, layer)) for at, kind, layer in events if at <= step]
    last = f"the last event was {past[-1][1]} before step {past[-1][0]}" if past else "no LayerNorm was removed yet"
    raise UserError(f"step {step}: {what}; {last}. {run.what_is_kept(out_dir)}, with a lower learning_rate, "
                    "or more steps between the events of ln_schedule")


def save():
    """A checkpoint of the model before this step, never one with NaN or inf, nor while steps are skipped."""
    if bad_steps or not all_finite(model):
        stop("a weight or constant is not finite" if not bad_steps else f"the last {bad_steps} steps were skipped")
    checkpoint.save(out_dir, step, model, optimizers, settings)


n_val = len(val_starts(val_tokens, eval_iters * batch_size, block_size))
ranks.say(f"{parameters / 1e6:.2f} M parameters from {'checkpoint' if resumed else init_from}, "
          f"{ranks.WORLD} x {machine}, {pick_dtype(dtype, machine)}, {tokens_per_step:,} tokens a step, "
          f"steps {start} to {max_iters}")
ranks.say(f"val loss over {n_val:,} of {(len(val_tokens) - 1) // block_size:,} windows")
for line in describe(ln_schedule, events):
    ranks.say(line)
flops_per_step = tokens_per_step * flops_per_token(model, block_size)
peak = peak_flops(machine)
micro_steps = gradient_accumulation_steps // ranks.WORLD
columns = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # fits into 80 columns
bar = tqdm(total=max_iters, initial=start, bar_format=columns, disable=None if ranks.RANK == 0 else True)
model.train()
interruption = None  # until there is a step to save
losses = {}  # {step: loss}
bad_steps = 0  # in a row

for step in range(start, max_iters + 1):
    if interruption and interruption.on_any_rank(machine):
        save()
        bar.close()
        interruption.exit(f"stopped at step {step}, saved to {out_dir}/ckpt.pt; "
                          f"continue with: {run.resume_command()}")

    # once in a while: the val loss; a checkpoint
    if step % eval_interval == 0 or step == max_iters:
        val_loss = evaluate()
        if not math.isfinite(val_loss):
            stop(f"the val loss is {val_loss}")
        log.write(dict(step=step, val_loss=val_loss))
        ranks.say(f"step {step:>6}  val loss {val_loss:.4f}")
    if step > start and (step == max_iters or (step % checkpoint_interval == 0 and not bad_steps)):
        save()
    if step == max_iters:
        break

    # the removal: before the step's forward pass, on its own batches
    began = time.perf_counter()
    with autocast:
        removed = remove(model, events, step, ids, ranks.mean, std_over, std_momentum)
    for entry in removed:
        log.write(entry)
        ranks.say(f"step {step:>6}  " + describe_event(entry))

    # the step
    lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters or max_iters)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    sums = {}  # {term: its mean over micro-batches so far}
    for i, (x, y) in enumerate(batches(step)):
        if ranks.WORLD > 1:  # gradients are averaged once, with the last micro-batch
            forward.require_backward_grad_sync = i == micro_steps - 1
        with autocast:
            loss, terms = objective(x, y)
        (loss / micro_steps).backward()
        sums = {name: sums.get(name, 0) + term.detach() / micro_steps for name, term in terms.items()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    *means, norm = ranks.mean(torch.stack([*sums.values(), norm])).tolist()
    terms = dict(zip(sums, means))
    bad = not all(map(math.isfinite, [*means, norm]))
    bad_steps = bad_steps + 1 if bad else 0
    if bad_steps > max_bad_steps:
        stop(f"the loss is {terms['loss']} and the gradient's norm {norm}, for {bad_steps} steps in a row")
    if not bad:
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad(set_to_none=True)

    # the log
    bar.update()
    losses[step] = terms["loss"]
    if bad:
        ranks.say(f"step {step:>6}  skipped: the loss is {terms['loss']}, the gradient's norm {norm}")
        log.write(dict(step=step, loss=None, skipped=True))
        continue
    seconds = time.perf_counter() - began
    speed = dict(tokens_per_s=round(tokens_per_step / seconds))
    if peak:
        speed["mfu"] = round(flops_per_step / seconds / peak / ranks.WORLD, 4)
    log.write(dict(step=step, **terms, lr=lr, **speed))
    far_up = still_far_up(losses, events, step)
    if far_up:
        ranks.say(far_up)
    speed = f"{speed['tokens_per_s']:,} tokens/s" + (f", MFU {speed['mfu']:.0%}" if peak else "")
    bar.set_postfix_str(f"loss {terms['loss']:.4f}, {speed}")
    if bar.disable and step % log_interval == 0:
        ranks.say(f"step {step:>6}  loss {terms['loss']:.4f}  lr {lr:.2e}  {speed}")
    interruption = interruption or ranks.Interruption()

bar.close()
if ranks.RANK == 0:
    model.save_pretrained(os.path.join(out_dir, "model"))
    if init_from != "scratch":
        copy_tokenizer(init_from, os.path.join(out_dir, "model"))
    elif os.path.isdir(meta.get("tokenizer", "")):
        copy_tokenizer(meta["tokenizer"], os.path.join(out_dir, "model"))
    n_removed = sum(site.removed for site in model.sites().values())
    state = "LN-free" if model.ln_free() else f"{n_removed} of {len(model.sites())} sites without LN"
    ranks.say(f"{out_dir}/model: {state}")
    say_next(run.next_command(settings, n_removed > 0))
ranks.leave()
