"""
The proof on a machine with one or more CUDA GPUs, in three parts.

    make gpu                     # the three of them; stop it and start it as you like, what is done stays done
    python -m dev.gpu checks         # the CPU's numbers; compiled, resumed, data parallel; what fits into memory
    python -m dev.gpu speed          # a training step at GPT-2's four sizes, beside nanoGPT's way; evaluation, decoding
    python -m dev.gpu job            # a GPT-2 small trained for minutes on this machine's Python files; its LayerNorms go
    python -m dev.gpu checks --small # any of them in a few minutes, at toy sizes, on a CPU too

All that it finds lies in out/gpu: report.md, a log and a json for each step. To do a step again, remove its json.
It needs no network and, of the packages, only torch, numpy, tiktoken, safetensors, pyarrow and tqdm: without
matplotlib there is no picture, and without requirements-dev.txt the tests are not run.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import nullcontext
from functools import partial

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch

from configurator import configure, take_source
from model import GPT, GPTConfig
from parts.compare import measure
from parts.device import autocast_to
from parts.files import write_json
from tools.sample import generate

# -----------------------------------------------------------------------------
small = False  # toy sizes, for a CPU
out_dir = "out/gpu"  # gets report.md, *.json, logs/ and a picture; the runs themselves are in runs/, beside it
minutes = 4.0  # >= 0: of the job's pretraining; each of its two fine-tunes takes half as long
# -----------------------------------------------------------------------------

def here(path):
    """A file of this repository; data/ and out/ are the working folder's."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), path)


GPUS = torch.cuda.device_count()
DEVICE = "cuda" if GPUS else "cpu"
SHAPES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
CONFIGS = {  # each with its model, and its micro-batch for 80 GB
    "remove_ln.py": ("gpt2", 64),
    "remove_ln_fast.py": ("gpt2", 64),
    "remove_ln_medium.py": ("gpt2-medium", 32),
    "remove_ln_large.py": ("gpt2-large", 16),
    "remove_ln_xl.py": ("gpt2-xl", 8),
}
TOY = dict(n_layer=2, n_head=2, n_embd=32)
NO_LN = [("ln_2", 2, 1), ("ln_1qk", 6, 1), ("ln_1v", 10, 1), ("ln_f", 14, None)]
EVENTS = [*NO_LN, ("eot", 15, None), ("bos", 16, None)]
SHORT = [f"--ln_schedule={EVENTS}", "--max_iters=20", "--eval_interval=100", "--eval_iters=2", "--log_interval=1"]


class StepFailed(Exception):
    """What a step found wrong, in one line."""


# -----------------------------------------------------------------------------
# scripts in processes of their own


def call(log, *command, **variables):
    """Run Python with these arguments, and changes of the environment -> what it printed, which goes into logs/LOG.txt
    too. StepFailed if it fails."""
    path = f"{out_dir}/logs/{log}.txt"
    env = os.environ | variables
    with open(path, "w") as f:
        code = subprocess.run([sys.executable, *command], stdout=f, stderr=subprocess.STDOUT, env=env).returncode
    with open(path) as f:
        text = f.read()
    if code:
        last = (text.strip().splitlines() or ["nothing was printed"])[-1]
        raise StepFailed(f"{' '.join(command)[:60]}... ended with {code}: {last}, see {path}")
    return text


def launcher(processes):
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def run_dir(name):
    return f"{out_dir}_runs/{name}"


def train_short(name, *flags, before=()):
    """Remove the LayerNorms of the bundled model in 20 steps -> the training losses."""
    call(name, *before, here("train.py"), *short_run(name), "--force", *flags)
    return losses_of(name)


def short_run(name):
    start = here("assets/tiny")
    flags = [*SHORT, f"--out_dir={run_dir(name)}", f"--init_from={start}"]
    return [here("config/remove_ln_tiny.py"), *flags, *["--batch_size=2", "--block_size=32"] * small]


def log_of(name):
    """The entries of a run's log.jsonl so far."""
    path = f"{run_dir(name)}/log.jsonl"
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def losses_of(name):
    return [entry["loss"] for entry in log_of(name) if "loss" in entry]


def furthest(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def bench(way, batch_size, shape, steps=6):
    """bench.py's figures of a training step, {"tokens_per_s", "memory_GB", "mfu"}; None: out of memory."""
    size = dict(batch_size=batch_size, block_size=1024, **shape)
    if small:  # little, as a CPU without bfloat16 takes 100 times as long for it
        size, steps = dict(batch_size=max(1, batch_size // 16), block_size=64, **TOY), 1
    settings = dict(way=way, steps=steps, **size)
    log = f"bench_{way.replace(' ', '_')}_{size['n_layer']}_{batch_size}".replace("'", "").replace(",", "")
    try:
        text = call(log, here("bench.py"), *(f"--{key}={value}" for key, value in settings.items()))
    except StepFailed as e:
        if "out of memory" in str(e).lower():
            return None
        raise
    return json.loads(text.splitlines()[-1])


# -----------------------------------------------------------------------------
# checks


def machine():
    rows = [["Python, torch", f"{sys.version.split()[0]}, {torch.__version__}"], ["CPU cores", os.cpu_count()]]
    for i in range(GPUS):
        properties = torch.cuda.get_device_properties(i)
        rows.append([f"GPU {i}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"])
    return dict(head=["machine", ""], rows=rows)


def stdlib():
    """Token files for the checks."""
    if not os.path.exists("data/stdlib/meta.json"):
        call("stdlib", here("prepare_owt.py"))
    return dict(head=["text of the checks", ""], rows=[["data/stdlib", "prepared"]])


def same_numbers():
    """Logits of the device against float64 on the CPU; the gradient of the loss in pieces against the plain one."""
    models = {"assets/tiny": GPT.from_pretrained(here("assets/tiny")).eval()}
    if not small:
        models["random, GPT-2 small's shape"] = random_model(SHAPES["gpt2"])
    rows, ok = [], True
    for name, model in models.items():
        idx = torch.randint(model.config.eot, (2, 256))
        with torch.no_grad():
            expected = model.double()(idx)[0]
        model.float().to(DEVICE)
        for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
            with torch.no_grad(), autocast_to(dtype, DEVICE):
                logits = model(idx.to(DEVICE))[0].double().cpu()
            apart = (logits - expected).abs().max().item()
            same = (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()
            rows.append([f"logits, {name}, {str(dtype)[6:]}", f"{apart:.1e}, same top token {same:.2%}"])
            ok = ok and apart < bound
        gradients = []
        for loss_only in (False, True):
            model.zero_grad()
            model(idx.to(DEVICE), idx.to(DEVICE), loss_only=loss_only)[1].backward()
            gradients.append(model.lm_head.weight.grad.double())
        apart = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
        rows.append([f"gradient in pieces, {name}, float32", f"{apart:.1e} of its norm"])
        ok = ok and apart < 1e-4
    return dict(head=["against float64 on the CPU", "largest difference"], rows=rows, ok=ok)


def random_model(shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(1024, 50257, eot=50256, **shape)).eval()


def compiled():
    """A removal through all its events, compiled, against the same one eager; and bfloat16 against float32."""
    eager = train_short("eager", "--dtype=float32")
    count = (f"import runpy, sys; sys.path.insert(0, {here('')!r}); sys.argv = sys.argv[1:]; "
             "runpy.run_path(sys.argv[0], run_name='__main__'); from torch._dynamo.utils import counters; "
             "print(counters['stats']['unique_graphs'])")
    text = call("compiled", "-c", count, here("train.py"), *short_run("compiled"), "--force", "--dtype=float32",
                "--compile=True")
    graphs = int(text.split()[-1])
    apart = furthest(eager, losses_of("compiled"))
    rounded = furthest(eager, train_short("bfloat16", "--dtype=bfloat16"))
    rows = [["compiled: largest difference of a loss", f"{apart:.1e}"], ["graphs", graphs],
            ["bfloat16: largest difference of a loss", f"{rounded:.1e}"]]
    return dict(head=["20 steps with 15 events, against eager float32", ""], rows=rows,
                ok=apart < 1e-2 and graphs <= 4 and rounded < 0.1)


def resumed():
    """Stopped by SIGTERM and gone on, against a run that was not."""
    whole = train_short("whole", "--dtype=float32")
    command = [sys.executable, here("train.py"), *short_run("stopped"), "--dtype=float32", "--force"]
    shutil.rmtree(run_dir("stopped"), ignore_errors=True)
    with open(f"{out_dir}/logs/stopped.txt", "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
    while process.poll() is None and len(losses_of("stopped")) < 8:
        time.sleep(0.05)
    process.terminate()
    process.wait()
    at = len(losses_of("stopped"))
    call("resumed", here("train.py"), *short_run("stopped"), "--dtype=float32", "--init_from=resume")
    apart = furthest(whole, losses_of("stopped"))
    with open(f"{run_dir('whole')}/model/model.safetensors", "rb") as a:
        with open(f"{run_dir('stopped')}/model/model.safetensors", "rb") as b:
            same = a.read() == b.read()
    rows = [["stopped before step", at], ["largest difference of a loss", f"{apart:.1e}"],
            ["the same weights to the bit", "yes" if same else "no: GPU kernels add in no fixed order"]]
    return dict(head=["SIGTERM, then resume", ""], rows=rows, ok=apart < 1e-2 and at < 20)


def data_parallel():
    """All GPUs there are, or two processes on a CPU, against one."""
    n = GPUS or 2
    flags = ["--dtype=float32", f"--gradient_accumulation_steps={n}", "--batch_size=4"]
    apart = furthest(train_short("parallel", *flags, before=launcher(n)), train_short("alone", *flags))
    rows = [["largest difference of a loss", f"{apart:.1e}"]]
    return dict(head=[f"{n} by {'nccl' if GPUS else 'gloo'}, against one process", ""], rows=rows, ok=apart < 1e-2)


def memory():
    """Of a step at each config's micro-batch, not compiled, which is halved until it fits; and by the line through
    two micro-batches the largest that should fit into other GPUs."""
    rows = []
    for config, (name, batch) in CONFIGS.items():
        found = None
        while batch >= 2 and found is None:
            found = bench("bfloat16, not compiled", batch, SHAPES[name], steps=1)
            batch = batch if found else batch // 2
        if found is None:
            rows.append([config, "none fits", "", "", "", "", ""])
            continue
        half = bench("bfloat16, not compiled", batch // 2, SHAPES[name], steps=1)
        each = max(1e-3, (found["memory_GB"] - half["memory_GB"]) / (batch - batch // 2))
        fixed = found["memory_GB"] - batch * each
        fits = [max(0, int((0.95 * size - fixed) / each)) for size in (24, 40, 80, 140)]
        rows.append([config, batch, f"{found['memory_GB']:.1f}", *fits])
        if small:
            break
    return dict(head=["config", "micro-batch", "GB", "24 GB", "40 GB", "80 GB", "140 GB"], rows=rows)


def tests():
    """The tests that are for the device, and all others, on the CPU."""
    missing = [name for name in ("pytest", "xdist", "transformers") if importlib.util.find_spec(name) is None]
    if small or missing:
        why = f"{', '.join(missing)} not installed" if missing else "--small"
        return dict(head=["tests", ""], rows=[["pytest", "not run: " + why]])
    pytest = ["-m", "pytest", "-q", here("tests"), "-n", str(min(8, os.cpu_count()))]
    on_device = call("tests_on_device", *pytest, "-m", "device")
    on_cpu = call("tests_on_cpu", *pytest, "-m", "not device", CUDA_VISIBLE_DEVICES="")
    rows = [[where, text.strip().splitlines()[-1]] for where, text in (("device", on_device), ("CPU", on_cpu))]
    return dict(head=["tests", ""], rows=rows)


# -----------------------------------------------------------------------------
# speed


def step_speed(name, batch):
    """Of a training step in each way, at a model's shape."""
    rows, base = [], None
    ways = ["nanoGPT's way, bfloat16", "bfloat16", "bfloat16, with a teacher", "bfloat16, not compiled"]
    for way in ways[-1:] if small and name != "gpt2" else ways:  # compiling takes a while, also of toys
        found = bench(way, batch, SHAPES[name])
        if found is None:
            rows.append([way, "out of memory", "", "", ""])
            continue
        base = base or (found["tokens_per_s"] if way.startswith("nanoGPT") else None)
        ratio = f"{found['tokens_per_s'] / base:.2f}" if base else ""
        rows.append([way, f"{found['tokens_per_s']:,.0f}", ratio, f"{found['mfu']:.0%}", f"{found['memory_GB']:.1f}"])
    return dict(head=[f"{name}, {batch} x 1,024 tokens" if not small else "toy", "tokens/s", "ratio", "MFU", "GB"],
                rows=rows)


def evaluation():
    """eval.py's pass and sample.py's decoding, with random weights."""
    model = random_model(TOY if small else SHAPES["gpt2"]).to(DEVICE)
    for site in model.sites().values():
        site.ln_mode = "fake"
    windows = 2 if small else 32
    tokens = np.random.default_rng(0).integers(0, 50000, windows * 1024 + 1).astype("<u2")
    starts = np.arange(windows) * 1024
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        autocast = autocast_to(dtype, DEVICE)
        seconds = fastest(lambda: measure({"m": model}, None, tokens, starts, 1024, 16, DEVICE, autocast))
        rows.append([f"evaluation, {str(dtype)[6:]}", f"{windows * 1024 / seconds:,.0f}"])
    for name, m in {"with LN sites": model, "folded": model.fold()}.items():
        seconds = fastest(lambda: list(generate(m, range(16), 64, 0, 0, None)))
        rows.append([f"decoding, {name}, float32", f"{64 / seconds:,.0f}"])
    return dict(head=["toy" if small else "GPT-2 small's shape", "tokens/s"], rows=rows)


def fastest(function):
    """Seconds: the least of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def where_time_goes():
    """The dozen operations of an eager bfloat16 step that take most of the device's time."""
    model = random_model(TOY if small else SHAPES["gpt2"]).to(DEVICE).train()
    idx = torch.randint(50000, (1, 64) if small else (16, 1024), device=DEVICE)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * bool(GPUS)
    key = "self_device_time_total" if GPUS else "self_cpu_time_total"
    for profiled in (False, True):
        with torch.profiler.profile(activities=activities) if profiled else nullcontext() as profile:
            for _ in range(2):
                with autocast_to(torch.bfloat16, DEVICE):
                    model(idx, idx, loss_only=True)[1].backward()
    averages = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in averages)
    rows = [[event.key[:60], f"{getattr(event, key) / total:.1%}"] for event in averages[:12]]
    return dict(head=["operation", "share of the device's time"], rows=rows)


# -----------------------------------------------------------------------------
# the job


def dataset():
    return "gpu_text_small" if small else "gpu_text"


def text():
    """The Python files of this machine's packages, by GPT-2's tokenizer if its vocabulary is at hand."""
    files = os.path.join(sysconfig.get_path("purelib"), "torch/nn" if small else "", "**", "*.py")
    try:
        import tiktoken

        tiktoken.get_encoding("gpt2")
        tokenizer = "gpt2"
    except Exception:  # tiktoken not there, or no network and no cache: whatever the reason, bytes will do
        tokenizer = "bytes"
    flags = [f"--dataset={dataset()}", f"--files={files}", f"--tokenizer={tokenizer}", "--force"]
    call("text", here("prepare_owt.py"), *flags)
    with open(f"data/{dataset()}/meta.json") as f:
        meta = json.load(f)
    rows = [["tokenizer", tokenizer], *([split, f"{meta[split]['tokens']:,} tokens"] for split in ("train", "val"))]
    return dict(head=["text", files], rows=rows)


def micro_batch():
    """The largest micro-batch that fits, and one GPU's tokens/s with it."""
    if small:
        return dict(head=["micro-batch", "tokens/s"], rows=[[4, 1000]])
    batch, found = 64, None
    while found is None and batch > 1:
        found = bench("bfloat16", batch, SHAPES["gpt2"])
        batch = batch if found else batch // 2
    if found is None:
        raise StepFailed("GPT-2 small doesn't fit into this GPU's memory")
    return dict(head=["micro-batch", "tokens/s"], rows=[[batch, round(found["tokens_per_s"])]])


def pretrained():
    """A GPT-2 small from random weights, for some minutes."""
    batch, speed = found_in("micro_batch")["rows"][0]
    steps = 20 if small else max(200, int(60 * minutes * speed / (batch * 1024)))
    shape = [f"--{key}={value}" for key, value in (TOY if small else SHAPES["gpt2"]).items()]
    schedule = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--warmup_iters=50"]
    return job_run("pretrained", "scratch", *shape, *schedule, f"--gradient_accumulation_steps={GPUS or 1}")


def fine_tuned(name, *configs):
    """config/remove_ln_fast.py's 300 steps and events, of as many tokens as `minutes` allows."""
    batch, speed = found_in("micro_batch")["rows"][0]
    micro_steps = 1 if small else max(1, round(60 * minutes / 2 / 300 * speed / (batch * 1024)))
    flags = [f"--gradient_accumulation_steps={(GPUS or 1) * micro_steps}"]
    if small:
        flags += ["--max_iters=60"] + [f"--ln_schedule={NO_LN}"] * (name == "removed")
    configs = (here("config/remove_ln_fast.py"), *configs)
    return job_run(name, run_dir("pretrained") + "/model", *flags, configs=configs)


def job_run(name, init_from, *flags, configs=()):
    """train.py, from where it was stopped -> what its log says."""
    batch, _ = found_in("micro_batch")["rows"][0]
    started = os.path.exists(f"{run_dir(name)}/ckpt.pt")
    flags = [*configs, *flags, f"--dataset={dataset()}", f"--batch_size={batch}", f"--out_dir={run_dir(name)}",
             f"--init_from={'resume' if started else init_from}", "--eval_interval=100", "--checkpoint_interval=50"]
    if small:
        flags += ["--compile=False", "--block_size=64", "--eval_iters=2"]
    else:
        flags += ["--block_size=1024"]
    if not started:
        flags += ["--force"]
    call(name, *(launcher(GPUS) if GPUS > 1 else ()), here("train.py"), *flags)
    log = log_of(name)
    vals = [entry["val_loss"] for entry in log if "val_loss" in entry]
    speeds = sorted(entry["tokens_per_s"] for entry in log if "tokens_per_s" in entry)
    middle = speeds[len(speeds) // 2]
    rows = [["steps", len(speeds)], ["val loss, first and last", f"{vals[0]:.4f}, {vals[-1]:.4f}"],
            ["tokens/s", f"{middle:,}"]]
    ratios = [entry["bos_std"] / entry["avg_std"] for entry in log if "bos_std" in entry]
    if ratios:
        rows.append(["std at position 0 over the others', at the site where it is most", f"{max(ratios):.1f}"])
    return dict(head=[name, ""], rows=rows)


def table():
    """eval.py's table, whether the result is LN-free, and the picture."""
    models = [run_dir("pretrained") + "/model", run_dir("removed_control"), run_dir("removed")]
    flags = [f"--dataset={dataset()}", f"--tokens={2_000 if small else 2_000_000}", f"--json={out_dir}/eval.json"]
    printed = call("table", here("eval.py"), f"--models={','.join(models)}", *flags)
    verdict = call("verify", here("eval.py"), "--verify", f"--models={models[-1]}").strip().splitlines()[-1]
    if importlib.util.find_spec("matplotlib"):
        call("plot", here("plot.py"), models[-1])
        shutil.copy(f"{models[-1]}/loss.png", out_dir)
    else:
        verdict += "; no picture, as matplotlib is not installed"
    return dict(head=["--verify", verdict], rows=[], text=printed)


# -----------------------------------------------------------------------------
# one step after another

PARTS = {
    "checks": dict(machine=machine, stdlib=stdlib, same_numbers=same_numbers, compiled=compiled, resumed=resumed,
                   data_parallel=data_parallel, memory=memory, tests=tests),
    "speed": dict(step_small=partial(step_speed, "gpt2", 16), step_medium=partial(step_speed, "gpt2-medium", 8),
                  step_large=partial(step_speed, "gpt2-large", 4), step_xl=partial(step_speed, "gpt2-xl", 2),
                  evaluation=evaluation, where_time_goes=where_time_goes),
    "job": dict(text=text, micro_batch=micro_batch, pretrained=pretrained, removed=partial(fine_tuned, "removed"),
                removed_control=partial(fine_tuned, "removed_control", here("config/control.py")), table=table),
}


def found_in(step):
    """What a step returned; None if it is not done."""
    path = f"{out_dir}/{step}.json"
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


def write_report():
    """out_dir/report.md, of all steps done so far."""
    lines = ["# LayerNorm out of GPT-2: what this machine says", ""]
    for part, steps in PARTS.items():
        lines += [f"## {part}", ""]
        for step in steps:
            found = found_in(step)
            if found is None:
                lines += [f"{step}: not done", ""]
                continue
            lines += [f"| {' | '.join(map(str, row))} |" for row in (found["head"], ["---"] * len(found["head"]))]
            lines += [f"| {' | '.join(map(str, row))} |" for row in found["rows"]] + [""]
            if "text" in found:
                lines += ["```", found["text"].strip(), "```", ""]
    with open(f"{out_dir}/report.md", "w") as f:
        f.write("\n".join(lines))


def main():
    global out_dir
    part = take_source("python -m dev.gpu checks, speed or job, and --small on a CPU")
    configure(globals(), sys.argv[1:], __doc__)
    if part not in PARTS:
        raise UserError(f"{part} is no part: it is {', '.join(PARTS)}")
    if not small and not GPUS:
        raise UserError("there is no CUDA GPU: --small tries this script itself, on the CPU")
    if small:
        out_dir += "_small"  # never taken for the real one
    os.makedirs(f"{out_dir}/logs", exist_ok=True)
    wrong = []
    for name, step in PARTS[part].items():
        if found_in(name):
            print(f"{name}: done before")
            continue
        print(f"{name} ...", flush=True)
        try:
            found = step()
        except StepFailed as e:
            print(f"{name}: {e}")
            wrong.append(name)
            break
        for row in found["rows"]:
            print("  " + "  ".join(map(str, row)))
        if found.pop("ok", True):
            write_json(f"{out_dir}/{name}.json", found)
        else:
            wrong.append(name)
        write_report()
    if wrong:
        raise UserError(f"{', '.join(wrong)}: not as it should be, see above and {out_dir}/logs")
    print(f"next: read {out_dir}/report.md")


if __name__ == "__main__":
    main()
