"""
Speed and memory, at GPT-2 small's shape with random weights unless told otherwise.

    python bench.py                   # a training step: each way in a process of its own, in turns
    python bench.py --what=eval       # the cross-entropy pass, against transformers
    python bench.py --what=hellaswag  # against one forward pass an example, of four padded rows
    python bench.py --what=sample     # decoding: folded against with LN, and against transformers' generate
    python bench.py --what=prepare    # 100 MB of text to tokens, against nanoGPT's way

Of a training step, `nanoGPT's way` is nanoGPT's step in our own lines: one LN and one product for query, key and
value, F.layer_norm, the logits whole, compiled; in float32, as it ships for a CPU, and under autocast. The other rows
are train.py's. A row's figures are the median over rounds: tokens a second of a step after the first two, MFU as train.py
counts it, and peak memory of the process or the GPU. The others
compare in one process, in turns, after one unmeasured round; transformers comes with
requirements-dev.txt. nanoGPT's way to prepare is datasets.map and shards written to a memmap.
"""
import glob
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure
from model import GPT, Block, GPTConfig
from parts import hellaswag
from parts.compare import cast_linear_maps, measure
from parts.data import read_windows
from parts.device import autocast_to
from parts.errors import UserError
from parts.speed import flops_per_token, peak_flops
from sample import generate, use_addmv

# -----------------------------------------------------------------------------
n_layer = 12  # >= 1: blocks
n_head = 12  # >= 1: attention heads
n_embd = 768  # >= 1: width
vocab_size = 50304  # >= 1: tokens
batch_size = 4  # >= 1: sequences
block_size = 256  # >= 1: tokens in a sequence
steps = 6  # >= 1: timed, in a round
rounds = 3  # >= 1: of which the median is shown
what = "train"  # train, eval, hellaswag, sample or prepare: what to measure
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


def compare(theirs, ours, name, unit, amount, width=12):
    """Time the two functions in turns, and print a line: amount a second of each, and the ratio."""
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
    print(f"{name:<{width}}{speeds[0]:>10,.1f}{speeds[1]:>10,.1f} {unit:<12}{median(ratios):>8.2f}  {spread}")


def print_head(about, width=12):
    print(f"{'':<{width}}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {about}")


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
    forward = model
    if way.compiled:
        forward = torch.compile(model)
        model.piece_loss = torch.compile(model.piece_loss)
        if way.taught:
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
        compare(theirs, ours, str(dtype)[6:], "tokens/s", steps * batch_size * block_size)
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
    compare(theirs, ours, "float32", "examples/s", len(examples))
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
        compare(lambda: decode(model), lambda: decode(folded), f"folded to LN, {name}", "tokens/s", n, 28)
        compare(theirs, lambda: decode(model), f"to transformers, {name}", "tokens/s", n, 28)


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


if __name__ == "__main__":
    main()
