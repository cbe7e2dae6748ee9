"""
Speed and memory, at GPT-2 small's shape with random weights unless told otherwise.

    python -m dev.bench                   # a training step: each way in a process of its own, in turns
    python -m dev.bench --what=eval       # the cross-entropy pass, against transformers
    python -m dev.bench --what=hellaswag  # against one forward pass an example, of four padded rows
    python -m dev.bench --what=sample     # decoding: folded against with LN, and against transformers' generate
    python -m dev.bench --what=prepare    # 100 MB of text to tokens, against nanoGPT's way
    python -m dev.bench --what=hours      # of each config on rented GPUs: computed from published rates, nothing is run
    python -m dev.bench --what=cost       # how a step's time grows with batch, context, layers and width: cost.png

Of a training step, `nanoGPT's way` is nanoGPT's step in our own lines: one LN and one product for query, key and
value, F.layer_norm, the logits whole, compiled; in float32, as it ships for a CPU, and under autocast. The other rows
are train.py's. A row's figures are the median over rounds: tokens a second of a step after the first two, MFU as
train.py counts it, and peak memory of the process or the GPU. The others compare in one process, in turns, after one
unmeasured round; "limit" is ours as a share of what the machine can do, in matrix products or, decoding, in reading
the weights, measured in the same run. transformers comes with requirements-dev.txt. nanoGPT's way to prepare is
datasets.map and shards written to a memmap.
"""
import glob
import json
import math
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure
from model import GPT, Block, GPTConfig
from parts import hellaswag
from parts.compare import cast_linear_maps, measure
from parts.data import read_windows
from parts.device import autocast_to, keep_memory
from parts.device import PEAK_FLOPS, flops_per_token, memory_bandwidth, peak_flops
from tools.sample import generate, use_addmv

# -----------------------------------------------------------------------------
n_layer = 12  # >= 1: blocks
n_head = 12  # >= 1: attention heads
n_embd = 768  # >= 1: width
vocab_size = 50304  # >= 1: tokens
batch_size = 4  # >= 1: sequences
block_size = 256  # >= 1: tokens in a sequence
steps = 6  # >= 1: timed, in a round
rounds = 3  # >= 1: of which the median is shown
what = "train"  # train, eval, hellaswag, sample, prepare, cost or hours: what to measure
way = ""  # one way in this process; "": all of them, in processes
# -----------------------------------------------------------------------------


@dataclass
class Way:
    """Of training."""

    dtype: torch.dtype
    plain: bool = False  # nanoGPT's blocks
    in_pieces: bool = True  # the loss, without whole logits
    compiled: bool = True
    taught: bool = False  # with KL to a teacher


WAYS = {
    "nanoGPT's way, float32": Way(torch.float32, plain=True, in_pieces=False),
    "nanoGPT's way, bfloat16": Way(torch.bfloat16, plain=True, in_pieces=False),
    "float32": Way(torch.float32),
    "bfloat16": Way(torch.bfloat16),
    "bfloat16, logits whole": Way(torch.bfloat16, in_pieces=False),
    "bfloat16, not compiled": Way(torch.bfloat16, compiled=False),
    "bfloat16, with a teacher": Way(torch.bfloat16, taught=True),
}
BASE = next(iter(WAYS))


def plain_norm(x, site):
    return F.layer_norm(x, site.weight.shape, site.weight, site.bias, site.eps)


class PlainBlock(Block):
    """With two LNs, as GPT-2 and nanoGPT have."""

    def forward(self, x, *_):
        read = plain_norm(x, self.ln_1qk)
        x = x + self.attn(read, read)
        return x + self.mlp(plain_norm(x, self.ln_2))


class PlainGPT(GPT):
    def final_norm(self, x, use_bos):
        return plain_norm(x, self.transformer.ln_f)


def random_model(positions=1024):
    torch.manual_seed(0)
    return GPT(GPTConfig(positions, vocab_size, n_layer, n_head, n_embd, eot=vocab_size - 1))


def compare(theirs, ours, name, unit, amount, width=12, limit=math.nan):
    """Time the two functions in turns, and print a line: amount a second of each, the ratio, and ours as a share of
    limit, what the machine could do a second."""
    times = []
    for _ in range(1 + rounds):
        pair = []
        for function in (theirs, ours):
            began = time.perf_counter()
            function()
            pair.append(time.perf_counter() - began)
        times.append(pair)
    ratios = [a / b for a, b in times[1:]]
    speeds = [amount / median(column) for column in zip(*times[1:])]
    spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
    share = "" if math.isnan(limit) else f"{speeds[1] / limit:.0%}"
    print(f"{name:<{width}}{speeds[0]:>10,.1f}{speeds[1]:>10,.1f} {unit:<12}{median(ratios):>8.2f}  {spread:<15}"
          f"{share:>6}".rstrip())


def print_head(about, width=12):
    print(f"{'':<{width}}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {'from, to':<15}{'limit':>6}   {about}")


# --- training


def train_speed(way):
    """{"tokens_per_s", "mfu", "memory_GB"} of one way, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(block_size).to(device)
    if way.plain:
        model.__class__ = PlainGPT
        for block in model.transformer.h:
            block.__class__ = PlainBlock
    taught_by = random_model(block_size).to(device).eval().requires_grad_(False) if way.taught else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if not way.plain:
        keep_memory()
    forward = model.compiled() if way.compiled else model
    if way.compiled and way.taught:
        taught_by.hidden = torch.compile(taught_by.hidden)
    idx = torch.randint(vocab_size - 1, (batch_size, block_size + 1), device=device)
    times = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        with autocast_to(way.dtype, device):
            told = None if taught_by is None else (taught_by.hidden(idx[:, :-1]), taught_by.lm_head.weight, 0.5)
            _, loss, *_ = forward(idx[:, :-1], idx[:, 1:], loss_only=way.in_pieces, teacher=told)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = peak_memory()
    speed = batch_size * block_size * steps / sum(times[2:])
    mfu = speed * flops_per_token(model, block_size) / peak_flops(device, way.dtype)
    return dict(tokens_per_s=speed, mfu=mfu, memory_GB=memory / 1e9)


def step_seconds(shape, batch, block):
    """The median of a bfloat16 step, not compiled, of a GPT of this shape; and its FLOPs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT(GPTConfig(block, vocab_size, *shape, eot=vocab_size - 1)).to(device)
    idx = torch.randint(vocab_size - 1, (batch, block + 1), device=device)
    times = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        with autocast_to(torch.bfloat16, device):
            model(idx[:, :-1], idx[:, 1:], loss_only=True)[1].backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[1:]), batch * block * flops_per_token(model, block)


def draw_cost(path="cost.png"):
    """A step's time against each dimension, its half to its fourfold, beside the time that its FLOPs would take at the
    first step's rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keep_memory()
    base = dict(batch=batch_size, context=block_size, layers=n_layer, width=n_embd)
    at_base, flops_at_base = step_seconds((n_layer, n_head, n_embd), batch_size, block_size)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True, layout="constrained")
    print(f"{'':<10}{'':>7}{'ms':>9}{'FLOP/s of the first':>22}")
    for axis, dimension in zip(axes, base):
        sizes, times, predicted = [], [], []
        for factor in (0.5, 1, 2, 4):
            size = int(base[dimension] * factor)
            now = base | {dimension: size}
            heads = max(1, n_head * now["width"] // n_embd)  # of one width each
            found, flops = step_seconds((now["layers"], heads, now["width"]), now["batch"], now["context"])
            sizes.append(size)
            times.append(1e3 * found)
            predicted.append(1e3 * at_base * flops / flops_at_base)
            print(f"{dimension:<10}{size:>7}{times[-1]:>9.0f}{predicted[-1] / times[-1]:>22.0%}")
        axis.plot(sizes, predicted, color="0.6", label="as the FLOPs grow")
        axis.plot(sizes, times, "o", color="C0", label="measured")
        axis.set(xscale="log", yscale="log", xlabel=dimension, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
    axes[0].set_ylabel("ms a step")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


# --- on paper


def print_hours():
    """Minutes and dollars of each config, without evaluations and start. Its tokens' FLOPs, at the share of the data
    sheet's that others have published for GPT-2 small: llm.c about 60 % on A100 and 40 % on H100, nanoGPT 29 % on A100;
    the 4090 at nanoGPT's. Prices an hour and GPU are assumed. Where activations are recomputed, a third more."""
    shapes = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
              "gpt2-xl": (48, 25, 1600)}
    rigs = [("8 x A100", 8, "A100", 0.60, 0.29, 1.5), ("8 x H100", 8, "H100", 0.40, 0.29, 2.5),
            ("4090", 1, "4090", 0.29, 0.29, 0.4)]
    print(f"{'':<21}{'G tokens':>8}" + "".join(f"{name + ', minutes':>20}{'$':>12}" for name, *_ in rigs))
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "config/remove_ln*.py"))):
        run = runpy.run_path(path)
        if run.get("init_from") not in shapes:
            continue
        with torch.device("meta"):
            model = GPT(GPTConfig(1024, 50257, *shapes[run["init_from"]]))
        tokens = run["max_iters"] * run["gradient_accumulation_steps"] * run["batch_size"] * run["block_size"]
        flops = tokens * flops_per_token(model, run["block_size"])
        if run.get("gradient_checkpointing"):
            flops *= 4 / 3
        line = f"{os.path.basename(path):<21}{tokens / 1e9:>8.2f}"
        for _, n, gpu, best, cautious, price in rigs:
            hours = [flops / (n * PEAK_FLOPS[gpu] * share) / 3600 for share in sorted({best, cautious}, reverse=True)]
            line += f"{' to '.join(f'{60 * h:.0f}' for h in hours):>20}"
            line += f"{' to '.join(f'{h * n * price:.1f}' for h in hours):>12}"
        print(line)


def peak_memory():
    """Of this process, in bytes; NaN on Windows, which has no getrusage."""
    if sys.platform == "win32":
        return math.nan
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # bytes there, KiB on Linux


def compare_train():
    """Each way in a process of its own, so that its peak memory is its own."""
    results = {name: [] for name in WAYS}
    for i in range(rounds):
        for name in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], f"--way={name}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            speed = results[name][-1]["tokens_per_s"]
            print(f"round {i + 1} of {rounds}, {name}: {speed:,.0f} tokens/s", file=sys.stderr)
    print(f"{'':<26}{'tokens/s':>10}{'ratio':>8}{'MFU':>6}{'peak memory, GB':>18}")
    for name, runs in results.items():
        pairs = zip(runs, results[BASE])
        ratio = median(run["tokens_per_s"] / base["tokens_per_s"] for run, base in pairs)
        speed = median(run["tokens_per_s"] for run in runs)
        memory = median(run["memory_GB"] for run in runs)
        mfu = median(run["mfu"] for run in runs)
        print(f"{name:<26}{speed:>10,.0f}{ratio:>8.2f}{mfu:>6.0%}{memory:>18.2f}")


# --- evaluation


def transformers_twin(model):
    """transformers' GPT2LMHeadModel with the same weights."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).eval()


def compare_eval():
    """eval.py's pass over windows, without faithfulness, against transformers' logits and
    F.cross_entropy."""
    model = random_model().eval()
    hf = transformers_twin(model)
    data = np.random.default_rng(0).integers(0, vocab_size, steps * batch_size * block_size + 1).astype("<u2")
    starts = np.arange(steps * batch_size) * block_size
    print_head(f"{batch_size} x {block_size} tokens at a time")
    for dtype in (torch.float32, torch.bfloat16):
        autocast = autocast_to(dtype, "cpu")
        losses = {}

        @torch.inference_mode()
        def theirs():
            for i in range(0, len(starts), batch_size):
                x, y = read_windows(data, starts[i : i + batch_size], block_size, "cpu")
                with autocast:
                    logits = hf(x).logits.float().flatten(0, 1)
                losses["theirs"] = F.cross_entropy(logits, y.flatten()).item()  # of the last batch

        def ours():
            found = measure({"model": model}, None, data, starts, block_size, batch_size, "cpu", autocast)
            losses["ours"] = found["model"]["loss"][-batch_size:].mean()

        if dtype == torch.bfloat16:
            cast_linear_maps(model)
        forward = flops_per_token(model, block_size) / 3
        limit = peak_flops("cpu", dtype) / forward
        compare(theirs, ours, str(dtype)[6:], "tokens/s", steps * batch_size * block_size, limit=limit)
        assert abs(losses["ours"] - losses["theirs"]) < 1e-3, losses


def compare_hellaswag():
    """hellaswag.score against a forward pass of our model for each example, its four rows padded to
    one length (build-nanogpt's way). The lengths are made up."""
    model = random_model().eval()
    rng = np.random.default_rng(0)

    def words(n):
        return " ".join(map(str, rng.integers(0, vocab_size - 1, max(3, int(n)))))

    def encode(text):
        return [int(word) for word in text.split()]

    def example():
        return hellaswag.Example(words(rng.normal(65, 25)), [words(rng.normal(25, 8)) for _ in range(4)], 0)

    examples = [example() for _ in range(16 * steps)]
    scores = {}

    @torch.inference_mode()
    def theirs():
        scores["theirs"] = []
        for example in examples:
            context = encode(example.context)
            rows = [context + encode(ending) for ending in example.endings]
            ids = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
            scored = torch.zeros(ids.shape)
            for k, row in enumerate(rows):
                ids[k, : len(row)] = torch.tensor(row)
                scored[k, len(context) : len(row)] = 1
            logits = model(ids)[0][:, :-1].flatten(0, 1)
            losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(4, -1) * scored[:, 1:]
            scores["theirs"].append((losses.sum(1) / scored.sum(1)).tolist())

    def ours():
        sums, counts = hellaswag.score(model, examples, encode, "cpu", nullcontext())
        scores["ours"] = sums / counts

    print_head("contexts of 65 ± 25 tokens, endings of 25 ± 8")
    rows = hellaswag.sequences(examples, encode, model.config.block_size)
    length = sum(map(len, rows)) / len(rows)
    limit = peak_flops("cpu", torch.float32) / (length * flops_per_token(model, length) / 3)
    compare(theirs, ours, "float32", "examples/s", len(examples), limit=limit)
    assert np.allclose(scores["theirs"], scores["ours"], atol=1e-3), "the scores differ"


# --- decoding


def compare_sample(n=256):
    """The likeliest n tokens after a prompt of 16, one sequence: the folded model against the same
    one with its LayerNorms, and that one against transformers' generate with its cache."""
    model = random_model().eval()
    hf = transformers_twin(model)
    free = random_model().eval()
    for site in free.sites().values():
        site.ln_mode = "fake"
    folded = free.fold()
    ids = list(range(100, 116))

    def decode(model):
        return list(generate(model, ids, n, 0, 0, None))

    def theirs():
        out = hf.generate(torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    assert decode(model) == theirs(), "the two decode otherwise"
    print_head(f"{n} tokens", 28)
    for dtype in (torch.float32, torch.bfloat16):
        for m in (model, folded, hf):
            m.to(dtype)
        if dtype == torch.bfloat16:
            use_addmv(model)
            use_addmv(folded)
        name = str(dtype)[6:]
        read = sum(p.nbytes for p in model.parameters())  # by each token, wpe but for a row
        limit = memory_bandwidth("cpu") / read
        compare(lambda: decode(model), lambda: decode(folded), f"folded to LN, {name}", "tokens/s", n, 28, limit)
        compare(theirs, lambda: decode(model), f"to transformers, {name}", "tokens/s", n, 28, limit)


# --- preparation


def source_texts(megabytes):
    """Python files of this machine, in documents of 4,000 characters."""
    texts, size = [], 0
    stdlib = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(os.path.join(stdlib, "**", "*.py"), recursive=True)):  # site-packages among them
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        texts += [text[i : i + 4000] for i in range(0, len(text), 4000)]
        size += len(text)
        if size > megabytes * 1e6:
            break
    return texts, size


def nanogpt_prepare(parquet, workers):
    """As nanoGPT's prepare.py does: datasets.map, then shards into a memmap."""
    import tiktoken
    from datasets import load_dataset

    bpe = tiktoken.get_encoding("gpt2")

    def process(row):
        ids = [*bpe.encode_ordinary(row["text"]), bpe.eot_token]
        return dict(ids=ids, len=len(ids))

    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset("parquet", data_files=parquet, split="train", cache_dir=cache)
        for split, part in rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True).items():
            part = part.map(process, remove_columns=["text"], num_proc=workers)
            out = np.memmap(split + ".bin", dtype=np.uint16, mode="w+", shape=(sum(part["len"]),))
            at, shards = 0, min(1024, len(part))
            for k in range(shards):
                ids = np.concatenate(part.shard(shards, k, contiguous=True).with_format("numpy")["ids"])
                out[at : at + len(ids)] = ids
                at += len(ids)
            out.flush()


def compare_prepare(megabytes=100):
    """prepare_owt.py on a parquet file of source code, against nanoGPT's way on the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    here = os.path.dirname(os.path.abspath(__file__))
    workers = os.cpu_count()
    texts, size = source_texts(megabytes)
    args = ["--dataset=text", "--files=text.parquet", "--tokenizer=gpt2", "--force"]

    def ours():
        subprocess.run([sys.executable, os.path.join(here, "prepare_owt.py"), *args], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pq.write_table(pa.table(dict(text=texts)), "text.parquet", row_group_size=1000)
        print_head(f"{size / 1e6:.0f} MB, {len(texts):,} documents, {workers} processes")
        compare(lambda: nanogpt_prepare("text.parquet", workers), ours, "prepare", "MB/s", size / 1e6)
        os.chdir(here)


def main():
    configure(globals(), sys.argv[1:], __doc__)
    if way:
        if way not in WAYS:
            raise UserError(f"unknown way {way!r}: it is one of {', '.join(WAYS)}")
        print(json.dumps(train_speed(WAYS[way])))
    elif what == "train":
        compare_train()
    elif what == "eval":
        compare_eval()
    elif what == "hellaswag":
        compare_hellaswag()
    elif what == "sample":
        compare_sample()
    elif what == "prepare":
        compare_prepare()
    elif what == "cost":
        draw_cost()
    elif what == "hours":
        print_hours()


if __name__ == "__main__":
    main()
