"""
Measure speed and memory, at GPT-2 small's shape with random weights.

    python -m dev.bench                   # a training step: train.py's beside nanoGPT's
    python -m dev.bench --what=eval       # the loss over windows, beside transformers
    python -m dev.bench --what=hellaswag  # beside one forward pass for each example, with four padded rows
    python -m dev.bench --what=sample     # decoding: folded, with LN, and transformers'
    python -m dev.bench --what=prepare    # 100 MB of text to tokens, beside nanoGPT's prepare.py

Training: "nanoGPT's way" is nanoGPT's step written with our modules: one LN and one product for query, key and value,
F.layer_norm, whole logits, compiled. The other rows are train.py's step. Each way runs in its own process, so that its
peak memory is its own, and the ways take turns. The table has medians over rounds of: tokens/s after two warm-up
steps, the ratio to the first row, MFU as in train.py, and peak memory of the GPU or, on a CPU, of the process.

The others: theirs and ours take turns in one process, after a round that does not count. They need
requirements-dev.txt.
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

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure
from model import GPT, Block, GPTConfig, LayerNorm
from parts import hellaswag
from parts.compare import cast_linear_maps, measure
from parts.data import read_windows
from parts.device import autocast_to, flops_per_token, keep_memory, peak_flops
from parts.loss import LossInPieces
from tools.sample import generate, use_addmv

# -----------------------------------------------------------------------------
what = "train"  # train, eval, hellaswag, sample or prepare; step: one way in this process, as JSON
way = ""  # train only the ways whose name contains this, such as bfloat16
rounds = 3  # the tables have medians over so many
steps = 6  # timed training steps, or batches of an evaluation, in a round
batch_size = 4  # sequences in a batch
block_size = 256  # tokens in a sequence
vocab_size = 50304
n_layer = 12
n_head = 12
n_embd = 768
# -----------------------------------------------------------------------------
REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KL_SHARE = 0.5  # in the way with a teacher


def random_model(positions=1024):
    torch.manual_seed(0)
    return GPT(GPTConfig(positions, vocab_size, n_layer, n_head, n_embd, eot=vocab_size - 1)).to(DEVICE)


# --- training


@dataclass
class Way:
    dtype: torch.dtype
    plain: bool = False  # nanoGPT's blocks
    in_pieces: bool = True  # the loss, without whole logits
    compiled: bool = True
    taught: bool = False  # half cross-entropy, half KL to a teacher


WAYS = {
    "nanoGPT's way, float32": Way(torch.float32, plain=True, in_pieces=False),
    "nanoGPT's way, bfloat16": Way(torch.bfloat16, plain=True, in_pieces=False),
    "float32": Way(torch.float32),
    "bfloat16": Way(torch.bfloat16),
    "bfloat16, logits whole": Way(torch.bfloat16, in_pieces=False),
    "bfloat16, not compiled": Way(torch.bfloat16, compiled=False),
    "bfloat16, with a teacher": Way(torch.bfloat16, taught=True),
}


class PlainNorm(LayerNorm):
    def forward(self, x, use_bos):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class PlainBlock(Block):
    """Two LNs, and one product for query, key and value."""

    def forward(self, x, use_bos, *_):
        normed = self.ln_1qk(x, use_bos)
        x = x + self.attn(normed, normed)
        return x + self.mlp(self.ln_2(x, use_bos))


def of_logits(logits, targets, teacher_logits):
    """The loss of train.py's objective: see LossInPieces."""
    log_p = logits.log_softmax(-1)
    ce = F.nll_loss(log_p, targets, reduction="sum")
    if teacher_logits is None:
        return ce, {}
    log_q = teacher_logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    return (1 - KL_SHARE) * ce + KL_SHARE * kl, {}


def measure_step(way):
    """A Way -> {"tokens_per_s", "mfu", "memory_GB", "loss": of the first step}, measured in this process."""
    model = random_model(block_size)
    if way.plain:
        for module in model.modules():
            module.__class__ = {LayerNorm: PlainNorm, Block: PlainBlock}.get(type(module), type(module))
    else:
        keep_memory()
    teacher = random_model(block_size).eval().requires_grad_(False) if way.taught else None
    if teacher and way.compiled:
        teacher.hidden = torch.compile(teacher.hidden)
    forward = torch.compile(model) if way.compiled else model
    in_pieces = LossInPieces(of_logits, model.lm_head, teacher and teacher.lm_head, way.compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in train.py

    tokens = torch.randint(vocab_size - 1, (batch_size, block_size + 1), device=DEVICE)
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses, times = [], []
    for _ in range(2 + steps):
        began = time.perf_counter()
        with autocast_to(way.dtype, DEVICE):
            if way.in_pieces:
                _, hidden = forward(x, streams=True)
                loss, _ = in_pieces(hidden, y, teacher and teacher.hidden(x))
            else:
                _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # .item() waits for the GPU
        times.append(time.perf_counter() - began)
    speed = batch_size * block_size * steps / sum(times[2:])
    mfu = speed * flops_per_token(model, block_size) / peak_flops(DEVICE, way.dtype)
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_memory()
    return dict(tokens_per_s=speed, mfu=mfu, memory_GB=memory / 1e9, loss=losses[0])


def peak_memory():
    """Of this process, in bytes; NaN on Windows."""
    if sys.platform == "win32":
        return math.nan
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest  # Linux counts in KiB


def compare_steps():
    """The table of training. A way that fails, out of memory for instance, gets its error as its row."""
    results = {name: [] for name in WAYS if way in name}
    errors = {}
    for i in range(rounds):
        for name in results.keys() - errors.keys() if i else results:
            command = ["-m", "dev.bench", *sys.argv[1:], "--what=step", f"--way={name}"]
            done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True)
            if done.returncode:
                errors[name] = done.stderr.strip().splitlines()[-1]
                continue
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            speed = results[name][-1]["tokens_per_s"]
            print(f"round {i + 1} of {rounds}, {name}: {speed:,.0f} tokens/s", file=sys.stderr)
    print(f"{'':<26}{'tokens/s':>10}{'ratio':>8}{'MFU':>6}{'peak memory, GB':>18}")
    base = None
    for name, found in results.items():
        if name in errors:
            print(f"{name:<26}{errors[name]}")
            continue
        base = base or found
        ratio = median(run["tokens_per_s"] / other["tokens_per_s"] for run, other in zip(found, base))
        speed, mfu, memory = (median(run[key] for run in found) for key in ("tokens_per_s", "mfu", "memory_GB"))
        print(f"{name:<26}{speed:>10,.0f}{ratio:>8.2f}{mfu:>6.0%}{memory:>18.2f}")


# --- theirs and ours in turns


def print_head(about, width=12):
    print(f"{'':<{width}}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {'from, to':<15}   {about}")


def compare(theirs, ours, name, unit, amount, width=12):
    """Time two functions in turns, and print a row: amount / seconds of each, and the ratio of ours to theirs."""
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


def transformers_twin(model):
    """transformers' GPT2LMHeadModel with the same weights."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).eval().to(DEVICE)


def compare_eval():
    """eval.py's loss over windows, beside transformers' logits and F.cross_entropy."""
    model = random_model().eval()
    hf = transformers_twin(model)
    data = np.random.default_rng(0).integers(0, vocab_size, steps * batch_size * block_size + 1).astype("<u2")
    starts = np.arange(steps * batch_size) * block_size
    print_head(f"{batch_size} x {block_size} tokens at a time")
    for dtype in (torch.float32, torch.bfloat16):
        autocast = autocast_to(dtype, DEVICE)
        losses = {}  # of the last batch

        @torch.inference_mode()
        def theirs():
            for i in range(0, len(starts), batch_size):
                x, y = read_windows(data, starts[i : i + batch_size], block_size, DEVICE)
                with autocast:
                    logits = hf(x).logits.float().flatten(0, 1)
                losses["theirs"] = F.cross_entropy(logits, y.flatten()).item()

        def ours():
            found = measure({"model": model}, None, data, starts, block_size, batch_size, DEVICE, autocast)
            losses["ours"] = found["model"]["loss"][-batch_size:].mean()

        if dtype == torch.bfloat16:
            cast_linear_maps(model)
        compare(theirs, ours, str(dtype)[6:], "tokens/s", steps * batch_size * block_size)
        assert abs(losses["ours"] - losses["theirs"]) < 1e-3, losses


def compare_hellaswag():
    """hellaswag.score on examples of random lengths, beside build-nanogpt's way: a forward pass for each example, with
    its four rows padded to one length."""
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
            logits = model(ids.to(DEVICE))[0][:, :-1].flatten(0, 1).cpu()
            losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(4, -1) * scored[:, 1:]
            scores["theirs"].append((losses.sum(1) / scored.sum(1)).tolist())

    def ours():
        sums, counts = hellaswag.score(model, examples, encode, DEVICE, nullcontext())
        scores["ours"] = sums / counts

    print_head("contexts of 65 ± 25 tokens, endings of 25 ± 8")
    compare(theirs, ours, "float32", "examples/s", len(examples))
    assert np.allclose(scores["theirs"], scores["ours"], atol=1e-3), "the scores differ"


def compare_sample(n=256):
    """The n likeliest tokens after a prompt of 16: the folded model beside the unfolded one, and that beside
    transformers' generate with its cache."""
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
        prompt = torch.tensor([ids], device=DEVICE)
        out = hf.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    assert decode(model) == theirs(), "the two decode differently"
    print_head(f"{n} tokens", 28)
    for dtype in (torch.float32, torch.bfloat16):
        for m in (model, folded, hf):
            m.to(dtype)
        if dtype == torch.bfloat16 and DEVICE == "cpu":
            use_addmv(model)
            use_addmv(folded)
        name = str(dtype)[6:]
        compare(lambda: decode(model), lambda: decode(folded), f"folded to LN, {name}", "tokens/s", n, 28)
        compare(theirs, lambda: decode(model), f"to transformers, {name}", "tokens/s", n, 28)


# --- preparation


def source_texts(megabytes):
    """This machine's Python files, in documents of 4,000 characters; and their size in characters."""
    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "**", "*.py"), recursive=True)):
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        texts += [text[i : i + 4000] for i in range(0, len(text), 4000)]
        size += len(text)
        if size > megabytes * 1e6:
            break
    return texts, size


def nanogpt_prepare(parquet, workers):
    """nanoGPT's data/openwebtext/prepare.py: datasets.map, then shards into a memmap."""
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
    """prepare_owt.py beside nanoGPT's way, on a parquet file of source code."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    workers = os.cpu_count()
    texts, size = source_texts(megabytes)
    script = [sys.executable, os.path.join(REPO, "prepare_owt.py")]
    args = ["--dataset=text", "--files=text.parquet", "--tokenizer=gpt2", "--force"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pq.write_table(pa.table(dict(text=texts)), "text.parquet", row_group_size=1000)
        print_head(f"{size / 1e6:.0f} MB, {len(texts):,} documents, {workers} processes")
        compare(lambda: nanogpt_prepare("text.parquet", workers),
                lambda: subprocess.run([*script, *args], check=True, capture_output=True),
                "prepare", "MB/s", size / 1e6)
        os.chdir(REPO)


# -----------------------------------------------------------------------------
WHATS = dict(train=compare_steps, eval=compare_eval, hellaswag=compare_hellaswag, sample=compare_sample,
             prepare=compare_prepare, step=lambda: print(json.dumps(measure_step(WAYS[way]))))


def main():
    sizes = ("rounds", "steps", "batch_size", "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict.fromkeys(sizes, 1), choices=dict(what=WHATS))
    matching = [name for name in WAYS if (way == name if what == "step" else way in name)]
    if not matching:
        raise UserError(f"no way is called {way!r}: choose one of {', '.join(WAYS)}")
    WHATS[what]()


if __name__ == "__main__":
    main()
