"""
Speed and memory, at GPT-2 small's shape with random weights unless told otherwise.

    python bench.py                         # a training step: each way in a process of its own, in turns
    python bench.py --what=eval             # the cross-entropy pass, against transformers (which requirements-dev.txt installs)
    python bench.py --what=hellaswag        # against one forward pass an example, of four padded rows
    python bench.py --what=sample           # decoding: folded against with LN, and sample.py against transformers' generate
    python bench.py --what=prepare          # 100 MB of text to tokens, against datasets.map and shards written to a memmap, as nanoGPT does
    python bench.py --n_layer=4 --n_head=6 --n_embd=192 --vocab_size=320 --batch_size=16

Of a training step, `nanoGPT's way` is this model as nanoGPT would train it on a CPU: float32, the logits whole, compiled. The other rows
are train.py's. A row's figures are the median over rounds; tokens a second of a step after the first two, peak memory of the process
or the GPU. The others compare in one process, in turns, after one unmeasured round.
"""
import glob
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

import hellaswag
import sample
from configurator import configure
from data import read_windows
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
batch_size = 4
block_size = 256
steps = 6  # timed, in a round
rounds = 3
what = "train"  # train, eval, hellaswag, sample or prepare
way = ""  # one way in this process; empty: all of them, in processes
# -----------------------------------------------------------------------------

WAYS = {  # name: (dtype, loss in pieces, compiled)
    "nanoGPT's way": (torch.float32, False, True),
    "float32": (torch.float32, True, True),
    "bfloat16": (torch.bfloat16, True, True),
    "bfloat16, logits whole": (torch.bfloat16, False, True),
    "bfloat16, not compiled": (torch.bfloat16, True, False),
}


def one(dtype, in_pieces, compiled):
    """{"tokens_per_s", "memory_GB"} of one way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, eot=vocab_size - 1)).to(device)
    model.train(in_pieces)  # no dropout: evaluation differs in the whole logits only
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if compiled else model
    if compiled:
        model.summed_loss = torch.compile(model.summed_loss)
    idx = torch.randint(vocab_size - 1, (batch_size, block_size + 1), device=device)
    times = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            loss = forward(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(tokens_per_s=batch_size * block_size * steps / sum(times[2:]), memory_GB=memory / 1e9)


def compare(theirs, ours, name, unit, amount, width=12):
    """Time the two functions in turns, and print a line."""
    times = []
    for _ in range(1 + rounds):
        pair = []
        for function in (theirs, ours):
            began = time.perf_counter()
            function()
            pair.append(time.perf_counter() - began)
        times.append(pair)
    ratios = [a / b for a, b in times[1:]]
    a, b = (median(list(column)) for column in zip(*times[1:]))
    print(f"{name:<{width}}{amount / a:>10,.1f}{amount / b:>10,.1f} {unit:<12}{median(ratios):>8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def random_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=1024, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, eot=vocab_size - 1))


def compare_eval():
    """eval.py's pass over windows, without faithfulness, against transformers' logits and F.cross_entropy."""
    from transformers import GPT2LMHeadModel

    import eval as evaluation

    model = random_model().eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
    data = np.random.default_rng(0).integers(0, vocab_size, steps * batch_size * block_size + 1).astype("<u2")
    starts = np.arange(steps * batch_size) * block_size
    evaluation.block_size, evaluation.batch_size, evaluation.device = block_size, batch_size, "cpu"

    @torch.inference_mode()
    def theirs():
        for i in range(0, len(starts), batch_size):
            x, y = read_windows(data, starts[i : i + batch_size], block_size, "cpu")
            with evaluation.autocast():
                losses["theirs"] = F.cross_entropy(hf(x).logits.float().flatten(0, 1), y.flatten(), reduction="none")

    def ours():
        losses["ours"] = evaluation.token_stats([("model", "original", model)], data, starts, None)["model"]["loss"]

    losses = {}
    print(f"{'':<12}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {batch_size} x {block_size} tokens at a time")
    for dtype in ("float32", "bfloat16"):
        evaluation.dtype = dtype
        if dtype == "bfloat16":
            evaluation.cast_linear_maps(model)
        compare(theirs, ours, dtype, "tokens/s", steps * batch_size * block_size)
        apart = abs(losses["ours"][-batch_size:].mean() - losses["theirs"].mean().item())
        assert apart < 1e-3, f"the two losses differ by {apart}"


def compare_hellaswag():
    """hellaswag.score against a forward pass of our model for each example, its four rows padded to one length (build-nanogpt's way)."""
    model, rng = random_model().eval(), np.random.default_rng(0)
    words = lambda n: " ".join(map(str, rng.integers(0, vocab_size - 1, max(3, n))))
    encode = lambda text: [int(word) for word in text.split()]
    examples = [(words(int(rng.normal(65, 25))), [words(int(rng.normal(25, 8))) for _ in range(4)], 0) for _ in range(16 * steps)]

    @torch.inference_mode()
    def theirs():
        scores["theirs"] = []
        for context, endings, _ in examples:
            rows = [encode(context) + encode(ending) for ending in endings]
            ids, scored = torch.zeros(4, max(map(len, rows)), dtype=torch.long), torch.zeros(4, max(map(len, rows)))
            for k, row in enumerate(rows):
                ids[k, : len(row)], scored[k, len(encode(context)) : len(row)] = torch.tensor(row), 1
            losses = F.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1) * scored[:, 1:]
            scores["theirs"].append((losses.sum(1) / scored.sum(1)).tolist())

    def ours():
        sums, counts = hellaswag.score(model, examples, encode, "cpu", nullcontext())
        scores["ours"] = sums / counts

    scores = {}
    print(f"{'':<12}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  contexts of 65 ± 25 tokens, endings of 25 ± 8")
    compare(theirs, ours, "float32", "examples/s", len(examples))
    assert np.allclose(scores["theirs"], scores["ours"], atol=1e-3), "the scores differ"


def compare_sample(n=256):
    """The likeliest n tokens after a prompt of 16, one sequence: the folded model against the same one with its LayerNorms, and that
    one against transformers' generate with its cache."""
    from transformers import GPT2LMHeadModel

    model = random_model().eval()
    free = random_model().eval()
    for name, site in free.sites().items():
        site.set_mode("fake")
    folded, ids = free.fold().eval(), list(range(100, 116))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
    decode = lambda model: list(sample.generate(model, ids, n, 0, 0, None))
    theirs = lambda: hf.generate(torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
    assert decode(model) == theirs(), "the two decode otherwise"
    print(f"{'':<28}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {n} tokens")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype), folded.to(dtype), hf.to(dtype)
        compare(lambda: decode(model), lambda: decode(folded), f"folded to LN, {str(dtype)[6:]}", "tokens/s", n, 28)
        compare(theirs, lambda: decode(model), f"to transformers, {str(dtype)[6:]}", "tokens/s", n, 28)


def compare_prepare(megabytes=100):
    """prepare_owt.py on a parquet file of source code in documents of 4,000 characters, against nanoGPT's prepare.py on the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tiktoken
    from datasets import load_dataset

    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "**", "*.py"), recursive=True)):  # site-packages among them
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
        texts += [text[i : i + 4000] for i in range(0, len(text), 4000)]
        size += len(text)
        if size > megabytes * 1e6:
            break
    bpe, workers, here = tiktoken.get_encoding("gpt2"), os.cpu_count(), os.path.dirname(os.path.abspath(__file__))

    def process(row):
        ids = [*bpe.encode_ordinary(row["text"]), bpe.eot_token]
        return dict(ids=ids, len=len(ids))

    def theirs():
        with tempfile.TemporaryDirectory() as cache:
            rows = load_dataset("parquet", data_files="text.parquet", split="train", cache_dir=cache)
            for split, part in rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True).items():
                part = part.map(process, remove_columns=["text"], num_proc=workers)
                n, at = sum(part["len"]), 0
                out = np.memmap(split + ".bin", dtype=np.uint16, mode="w+", shape=(n,))
                for k in range(shards := min(1024, len(part))):
                    ids = np.concatenate(part.shard(shards, k, contiguous=True).with_format("numpy")["ids"])
                    out[at : at + len(ids)] = ids
                    at += len(ids)
                out.flush()

    def ours():
        command = [sys.executable, os.path.join(here, "prepare_owt.py"), "--dataset=text", "--files=text.parquet", "--tokenizer=gpt2", "--force"]
        subprocess.run(command, check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        pq.write_table(pa.table(dict(text=texts)), "text.parquet", row_group_size=1000)
        print(f"{'':<12}{'theirs':>10}{'ours':>10} {'':<12}{'ratio':>8}  {size / 1e6:.0f} MB, {len(texts):,} documents, {workers} processes")
        compare(theirs, ours, "prepare", "MB/s", size / 1e6)
        os.chdir(here)


def main():
    for name, value in configure(globals(), sys.argv[1:], __doc__).items():
        if type(value) is int and value < 1:
            sys.exit(f"error: {name} is {value}, but it must be 1 or more")
    others = dict(eval=compare_eval, hellaswag=compare_hellaswag, sample=compare_sample, prepare=compare_prepare)
    if what in others:
        return others[what]()
    if what != "train":
        sys.exit(f"error: unknown --what={what}: it is train, {', '.join(others)}")
    if way:
        if way not in WAYS:
            sys.exit(f"error: unknown way {way!r}: it is one of {', '.join(WAYS)}")
        print(json.dumps(one(*WAYS[way])))
        return
    results = {name: [] for name in WAYS}
    for i in range(rounds):
        for name in WAYS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--way={name}"], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {name} failed: {done.stderr.strip().splitlines()[-1]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1} of {rounds}, {name}: {results[name][-1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    print(f"{'':<24}{'tokens/s':>10}{'ratio':>8}{'peak memory, GB':>18}")
    for name, runs in results.items():
        ratio = median([run["tokens_per_s"] / base["tokens_per_s"] for run, base in zip(runs, results["nanoGPT's way"])])
        print(f"{name:<24}{median([r['tokens_per_s'] for r in runs]):>10,.0f}{ratio:>8.2f}{median([r['memory_GB'] for r in runs]):>18.2f}")


if __name__ == "__main__":
    main()
