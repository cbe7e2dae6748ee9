"""
Train GPT-2, and remove its LayerNorms on a schedule.

    python train.py config/remove_ln_tiny.py                        # the LN-free model, on the bundled data and weights
    python train.py config/remove_ln_tiny.py config/control.py      # the same run with its LNs kept: the control
    torchrun --nproc_per_node=8 train.py config/remove_ln.py        # GPT-2 small, data parallel
    python train.py config/remove_ln_tiny.py --init_from=resume     # go on after an interruption

How a LayerNorm is removed: `timeline` turns ln_schedule into events, `remove` carries one step's events out on the model, and
the loop at the end of the file calls it before that step's forward pass.
"""
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure, one_line_errors, stop
from files import check_out_dir, remove_files
from data import open_tokens, pick_device, read_meta, read_windows, train_starts, val_starts
from model import GPT, KINDS, GPTConfig

# -----------------------------------------------------------------------------
# files
out_dir = "out/run"  # gets ckpt.pt, model/, log.jsonl and settings.json
init_from = "assets/tiny"  # a Hugging Face directory; `scratch`: random weights; `resume`: out_dir/ckpt.pt
dataset = "stdlib"  # a folder under data/, made by prepare_owt.py
seed = 1337  # of the data order, of random weights and of dropout
# removal: rows (kind, first step, steps between layers); kinds ln_2, ln_1qk, ln_1v (a layer at a time, 0: all at once), ln_f, eot, bos (None)
ln_schedule = []
# steps
max_iters = 300
batch_size = 16  # sequences in a micro-batch
gradient_accumulation_steps = 1  # micro-batches in a step, over all processes
block_size = 256  # tokens in a sequence
# the model, for init_from=scratch
n_layer = 12
n_head = 12
n_embd = 768
bias = True  # in LayerNorms and linear maps, as GPT-2 has
dropout = 0.0
gradient_checkpointing = False  # recompute activations in the backward pass: less memory, about a third more time
aux_loss_weight = 0.0  # of the squared spread of the std before ln_f (arXiv 2507.02559); 0: none
# AdamW
learning_rate = 6e-4  # after warmup_iters, then a cosine to min_lr at lr_decay_iters
min_lr = 6e-5
warmup_iters = 100
lr_decay_iters = 2000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
# evaluation and log
eval_interval = 100  # steps between evaluations, each of which also saves a checkpoint
eval_iters = 20  # micro-batches of val windows, spread evenly over the val file
log_interval = 10  # steps between printed lines; log.jsonl has every step
wandb_log = False  # log to Weights & Biases too (pip install wandb)
wandb_project = "remove-layernorm"
# machine
device = "auto"  # cuda, mps or cpu, the first that is there; or one by name
dtype = "auto"  # of autocast: bfloat16 where the machine has it, else float32
compile = True  # torch.compile: a few minutes once, then faster steps; needs a C++ compiler on a CPU
# -----------------------------------------------------------------------------


def timeline(ln_schedule, n_layer, max_iters):
    """The removal events [(step, kind, layer or None), ...] in the order they happen. ValueError on a schedule that can't run."""
    events, seen = [], set()
    for row in ln_schedule:
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise ValueError(f"ln_schedule: {row!r} is not a row (kind, first step, steps between layers)")
        kind, first, gap = row
        if kind not in (*KINDS, "ln_f", "eot", "bos"):
            raise ValueError(f"ln_schedule: unknown kind {kind!r}: it is one of {', '.join(KINDS)}, ln_f, eot, bos")
        if kind in seen:
            raise ValueError(f"ln_schedule: {kind} has two rows")
        seen.add(kind)
        first_ok, gap_ok = (type(n) is int and n >= 0 for n in (first, gap))
        if not first_ok or not (gap_ok if kind in KINDS else gap is None):
            raise ValueError(f"ln_schedule: in {tuple(row)!r} the first step must be 0 or more, and the steps between layers "
                             + ("0 or more" if kind in KINDS else "None"))
        events += [(first + gap * layer, kind, layer) for layer in range(n_layer)] if kind in KINDS else [(first, kind, None)]
    events.sort(key=lambda event: event[0])  # stable: events of one step keep the schedule's order
    if events and events[-1][0] >= max_iters:
        step, kind, layer = events[-1]
        raise ValueError(f"ln_schedule: {site_name(kind, layer)} at step {step} never happens: max_iters is {max_iters}")
    return events


def site_name(kind, layer):
    return kind if layer is None else f"h.{layer}.{kind}"


def state_at(events, step, names):
    """({site: mode}, {treatment: on}) after the events of all steps before `step`: a pure function of the schedule."""
    past = {site_name(kind, layer) for k, kind, layer in events if k < step}
    scheduled = {kind for _, kind, _ in events}
    modes = {name: "fake" if name in past else "real" for name in names}
    return modes, {t: t in scheduled and t not in past for t in ("bos", "eot")}


@torch.no_grad()
def remove(model, events, batches, context):
    """Carry out one step's events: measure the constants of the sites that are still real on the step's own batches, averaged
    over processes, then switch. Returns a log entry for each event."""
    real = {name: site for name, site in model.sites().items() if site.ln_mode == "real"}
    if any(site_name(kind, layer) in real for _, kind, layer in events):
        stds = []
        model.eval()
        for x, _ in batches:
            with context:
                model.measure_std(x)
            stds.append(torch.stack([torch.stack([site.avg_std, site.bos_std]) for site in real.values()]))
        model.train()
        for site, (avg_std, bos_std) in zip(real.values(), mean_over_processes(torch.stack(stds).mean(0))):
            site.avg_std.copy_(avg_std)
            site.bos_std.copy_(bos_std)
    entries = []
    for step, kind, layer in events:
        name = site_name(kind, layer)
        if kind in ("bos", "eot"):
            model.set_treatment(kind, False)
            entries.append(dict(step=step, event=name, treatment="off"))
        else:
            model.set_ln_mode(kind, layer, "fake")
            entries.append(dict(step=step, event=name, mode="fake", avg_std=real[name].avg_std.item(), bos_std=real[name].bos_std.item()))
    return entries


def mean_over_processes(t):
    """The tensor t, averaged over processes in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
        t /= dist.get_world_size()
    return t


def leave_processes():
    """What every process does last: gloo can hang at exit when a tensor was the last thing that was sent (torch 2.13)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def learning_rate_at(step):
    """Linear warm-up, then a cosine down to min_lr: nanoGPT's."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def make_optimizer(model):
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),  # matrices and embeddings
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]  # biases and LNs
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)


def save_checkpoint(path, checkpoint):
    """Write under a temporary name, flush, rename: the old checkpoint stays until the new one is whole."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        cause = e.__context__ if isinstance(e.__context__, OSError) else e  # a full disk, say, behind torch's own error
        raise OSError(f"can't save {path}: {str(cause).splitlines()[0]}; an older checkpoint there is untouched") from None


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. FileNotFoundError or ValueError, one line, if it is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing to resume: {path} is not there") from None
    except Exception as e:  # torch.load raises many kinds
        raise ValueError(f"{path} is not a whole checkpoint, cut short or not ours ({type(e).__name__})") from None
    missing = {"model", "model_config", "ln_state", "optimizer", "step", "settings", "rng"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(sorted(missing))}")
    return checkpoint


def read_log(path, end):
    """The whole lines of a log.jsonl that are of steps before `end`. ValueError, one line, if it is not one."""
    try:
        with open(path) as f:
            return [line for line in f if line.endswith("\n") and json.loads(line)["step"] < end]
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"{path} is not a log of train.py ({type(e).__name__}: {e}): move it away to go on without it") from None


def get_rng_state(device_type):
    return dict(cpu=torch.get_rng_state()) | (dict(cuda=torch.cuda.get_rng_state()) if device_type == "cuda" else {})


def set_rng_state(state, device_type):
    torch.set_rng_state(state["cpu"])
    if device_type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def pick_device_and_dtype():
    name = pick_device(device)
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, but it must be auto, float32 or bfloat16")
    if dtype != "auto":
        return name, getattr(torch, dtype)
    has_bf16 = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": lambda: False,
                "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16", False)}
    return name, torch.bfloat16 if has_bf16[name.split(":")[0]]() else torch.float32


PEAK_FLOPS = {  # dense bf16, the makers' data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "4090": 165e12,
}


def peak_flops(where, amp_dtype):
    """FLOP/s of one device: the data sheet's for a known GPU in bfloat16, else a 2048 x 2048 matrix product's, timed here."""
    if where.startswith("cuda") and amp_dtype == torch.bfloat16:
        known = [peak for name, peak in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(where).replace("-", " ").split()]
        if known:
            return known[0]
    a, times = torch.full((2048, 2048), 0.5, device=where, dtype=amp_dtype), []  # draws nothing from the random state
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def flops_per_token(model, T):
    """Forward and backward (PaLM, arXiv 2204.02311, appendix B): 6 per weight that multiplies, and attention's 12 L C T."""
    c = model.config
    return 6 * (sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()) + 12 * c.n_layer * c.n_embd * T


def check_settings():
    counts = ("batch_size", "gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd", "eval_interval", "eval_iters",
              "log_interval", "max_iters")
    rates = ("seed", "learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2", "grad_clip", "dropout",
             "aux_loss_weight")
    for name in (*counts, *rates):
        low, high = int(name in counts), dict(beta1=1, beta2=1, dropout=1, seed=2**63).get(name, math.inf)
        if not low <= globals()[name] < high:
            raise ValueError(f"{name} is {globals()[name]}, but it must be {low} or more" + f", and below {high}" * (high < math.inf))
    if wandb_log and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb_log needs `pip install wandb`")
    compilers = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang")  # what inductor and Triton look for
    if compile and not any(name and shutil.which(name) for name in compilers):
        raise ValueError("compile needs a C++ compiler, and there is none here: install g++, or run with --compile=False")


def main():
    settings = configure(globals(), sys.argv[1:], __doc__)

    # processes: one, or torchrun's. Rank 0 writes and prints.
    rank, world, local_rank = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    master = rank == 0
    with one_line_errors():
        check_settings()
        where, amp_dtype = pick_device_and_dtype()
        if gradient_accumulation_steps % world:
            divisors = ", ".join(str(n) for n in range(1, gradient_accumulation_steps + 1) if gradient_accumulation_steps % n == 0)
            raise ValueError(f"gradient_accumulation_steps {gradient_accumulation_steps} is not a multiple of {world} processes: "
                             f"it can be run by {divisors}")
    if where == "cuda":
        where = f"cuda:{local_rank}"
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")  # TF32, where autocast is off
    if world > 1:
        gpu = torch.device(where) if where.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=2))  # rank 0 may fetch weights for long
    device_type = where.split(":")[0]
    context = torch.autocast(device_type, amp_dtype) if amp_dtype != torch.float32 else nullcontext()
    torch.manual_seed(seed)  # the same weights on every process

    # data, model, optimizer
    if world > 1 and not master:
        dist.barrier()  # rank 0 goes first, and fetches the weights into the cache
    with one_line_errors():
        check_out_dir(out_dir, init_from)
        meta = read_meta(dataset)
        checkpoint = load_checkpoint(os.path.join(out_dir, "ckpt.pt")) if init_from == "resume" else None
        if checkpoint:
            model = GPT(GPTConfig(**checkpoint["model_config"] | dict(dropout=dropout)))
            model.load_state_dict(checkpoint["model"])
            model.load_ln_state(checkpoint["ln_state"])
        elif init_from == "scratch":
            vocab_size = -(-meta["vocab_size"] // 64) * 64  # a multiple of 64 is faster, as nanoGPT's 50304
            model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, meta["eot"]))
        else:
            model = GPT.from_pretrained(init_from, dropout=dropout)
            if model.config.eot != meta["eot"] and master:
                print(f"note: end-of-text is {meta['eot']} in data/{dataset}, but {model.config.eot} in {init_from}: was it trained on such tokens?")
            model.config.eot = meta["eot"]
        if block_size > model.config.block_size:
            most = model.config.block_size
            raise ValueError(f"block_size {block_size} is beyond the model's {most} positions: --block_size={most}")
        train_tokens = open_tokens(dataset, "train", block_size, model.config.vocab_size)
        val_tokens = open_tokens(dataset, "val", block_size, model.config.vocab_size)
        events = timeline(ln_schedule, model.config.n_layer, max_iters)
        start = checkpoint["step"] if checkpoint else 0
        if start > max_iters:
            raise ValueError(f"the checkpoint in {out_dir} is at step {start}, beyond max_iters {max_iters}")
        modes, treatments = state_at(events, start, model.sites())
        if events and model.config.folded:
            raise ValueError(f"{init_from} is folded: it has no LayerNorm that ln_schedule could remove")
        if (events or checkpoint) and model.ln_modes() != modes:
            name = next(name for name in modes if modes[name] != model.ln_modes()[name])
            raise ValueError(f"{name} is {model.ln_modes()[name]} at step {start}, but by ln_schedule it should be {modes[name]}")
        for kind, on in treatments.items():
            model.set_treatment(kind, on)
        os.makedirs(out_dir, exist_ok=True)
        if master:
            with open(os.path.join(out_dir, "settings.json"), "w") as f:  # first of all: it marks the folder as a run's
                json.dump(settings, f, indent=2)
        log_path, checkpoint_path = os.path.join(out_dir, "log.jsonl"), os.path.join(out_dir, "ckpt.pt")
        lines = []
        if checkpoint and os.path.exists(log_path):  # drop what happened after the checkpoint: it will happen again
            lines = read_log(log_path, start)
        if master:
            if not checkpoint and os.path.exists(checkpoint_path):
                print(f"note: {out_dir} holds an earlier run, which this one replaces")
            with open(log_path + ".tmp", "w") as f:
                f.writelines(lines)
            os.replace(log_path + ".tmp", log_path)
            log = open(log_path, "a")
    if world > 1 and master:
        dist.barrier()
    model.to(where)
    model.gradient_checkpointing = gradient_checkpointing
    optimizer = make_optimizer(model)
    torch.manual_seed(seed + rank)  # another dropout on every process
    if checkpoint:
        optimizer.load_state_dict(dict(state=checkpoint["optimizer"]["state"], param_groups=optimizer.state_dict()["param_groups"]))
        set_rng_state(checkpoint["rng"], device_type)
        settings["init_from"] = checkpoint["settings"]["init_from"]
        changed = [key for key, old in checkpoint["settings"].items() if key != "out_dir" and settings.get(key) != old]
        if changed and master:
            old = checkpoint["settings"]
            print("note: not as in the checkpoint: " + ", ".join(f"{key} {old[key]!r} -> {settings.get(key)!r}" for key in changed))
    settings |= {key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "bias")}
    # events switch the raw model; the wrappers share its tensors
    compiled = torch.compile(model) if compile else model
    if compile:
        model.summed_loss = torch.compile(model.summed_loss)  # a graph of its own: see GPT.loss_in_pieces
    forward = DDP(compiled, device_ids=[local_rank] if device_type == "cuda" else None, forward_sync_buffers=False) if world > 1 else compiled

    def batches(step):
        """This process's micro-batches (x, y) of the step's global batch; every micro-batch is the same for any number of processes."""
        starts = train_starts(train_tokens, seed, step, gradient_accumulation_steps * batch_size, block_size)
        for i in range(rank, gradient_accumulation_steps, world):
            yield read_windows(train_tokens, starts[i * batch_size : (i + 1) * batch_size], block_size, where)

    @torch.no_grad()
    def evaluate():
        """Mean loss in nats per token over the same val windows each time."""
        model.eval()
        starts = val_starts(val_tokens, eval_iters * batch_size, block_size)
        total = torch.zeros((), device=where)
        for i in range(rank * batch_size, len(starts), world * batch_size):
            x, y = read_windows(val_tokens, starts[i : i + batch_size], block_size, where)
            with context:
                total += compiled(x, y, loss_only=True)[1] * len(x)
        model.train()
        return (mean_over_processes(total) * world / len(starts)).item()

    def save(step):
        if master:
            save_checkpoint(checkpoint_path, dict(model=model.state_dict(), model_config=vars(model.config), ln_state=model.ln_state(),
                                                  optimizer=optimizer.state_dict(), step=step, settings=settings, rng=get_rng_state(device_type)))
            remove_files(os.path.join(out_dir, "model"), ["config.json", "model.safetensors"])  # an earlier run's: eval.py must not take it for this one's

    def record(entry):
        if master:
            with one_line_errors():
                log.write(json.dumps(entry) + "\n")
                log.flush()
            if wandb_log:
                wandb.log(entry, step=entry["step"])

    if wandb_log and master:
        import wandb

        try:
            wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=settings)
        except wandb.Error as e:  # not logged in, or no network
            stop(f"wandb_log: {str(e).splitlines()[0]}")
    peak = peak_flops(where, amp_dtype)
    stop_signal = []

    def on_signal(number, frame):
        stop_signal.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    if master:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters from {init_from}, {world} x {where}, {amp_dtype}, "
              f"{tokens_per_step:,} tokens a step, steps {start} to {max_iters}")
        for kind, _, _ in ln_schedule:
            steps = ", ".join(str(k) for k, name, _ in events if name == kind)
            print(f"  {kind:<7}{'off' if kind in ('bos', 'eot') else 'fake'} before step {steps}")
        with one_line_errors(), open(os.path.join(out_dir, "settings.json"), "w") as f:
            json.dump(settings, f, indent=2)

    bar = tqdm(total=max_iters, initial=start, unit="step", disable=None if master else True)
    say = bar.write if master else lambda line: None
    model.train()
    for step in range(start, max_iters + 1):
        if mean_over_processes(torch.tensor(float(len(stop_signal)), device=where)) > 0:  # all processes stop at one step
            bar.close()
            with one_line_errors():
                save(step)
            launcher = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world)}"]
            say(f"stopped at step {step}, saved to {checkpoint_path}; go on with: {shlex.join([*launcher, *sys.argv])} --init_from=resume")
            leave_processes()
            sys.exit(128 + (stop_signal or [signal.SIGTERM])[0])

        if step % eval_interval == 0 or step == max_iters:
            val_loss = evaluate()
            record(dict(step=step, val_loss=val_loss))
            say(f"step {step:>6}  val loss {val_loss:.4f}")
            if step > start:
                with one_line_errors():
                    save(step)
        if step == max_iters:
            break

        due = [event for event in events if event[0] == step]
        if due:
            for entry in remove(model, due, batches(step), context):
                record(entry)
                now = f"fake, std {entry['avg_std']:.4f}, at position 0 {entry['bos_std']:.4f}" if "mode" in entry else "treatment off"
                say(f"step {step:>6}  {entry['event']} {now}")

        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        loss_sum = torch.zeros((), device=where)
        own_steps = gradient_accumulation_steps // world
        for i, (x, y) in enumerate(batches(step)):
            last = i == own_steps - 1
            with forward.no_sync() if world > 1 and not last else nullcontext():  # gradients are averaged once a step
                with context:
                    _, loss, *aux = forward(x, y, aux_loss_weight > 0)
                ((loss + aux_loss_weight * aux[0] if aux else loss) / own_steps).backward()
            loss_sum += loss.detach() / own_steps
        if grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss = mean_over_processes(loss_sum).item()
        if not math.isfinite(loss):
            bar.close()
            leave_processes()
            sys.exit(f"error: the loss is {loss} at step {step}; the last checkpoint stays as it is. "
                     "Try a lower learning_rate or more steps between events" if master else 1)
        speed = tokens_per_step / (time.perf_counter() - began)
        mfu = speed * flops_per_token(model, block_size) / (peak * world)
        record(dict(step=step, loss=loss, lr=learning_rate_at(step), tokens_per_s=round(speed), mfu=round(mfu, 4)))
        bar.update()
        bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}")
        if bar.disable and step % log_interval == 0:
            say(f"step {step:>6}  loss {loss:.4f}  lr {learning_rate_at(step):.2e}  {speed:,.0f} tokens/s  MFU {mfu:.0%}")

    bar.close()
    if master:
        with one_line_errors():
            model.save_pretrained(os.path.join(out_dir, "model"))
        fake = list(model.ln_modes().values()).count("fake")
        print(f"{out_dir}/model: " + ("LN-free" if model.ln_free() else f"{fake} of {len(model.sites())} sites fake"))
    leave_processes()


if __name__ == "__main__":
    main()
