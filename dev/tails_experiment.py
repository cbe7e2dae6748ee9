"""
What happens on tokens that the fine-tuning never saw? A constant divisor bounds nothing there.

    python -m dev.tails --hide                       # data/testbed_seen: testbed_tune without some tokens
    python -m dev.tails --models=A,B --part=choose   # tails of the original and the models, on five texts

Hidden tokens are those with control characters (tabs, carriage returns, ...) or non-ASCII bytes, and the identifiers
that are rarest in testbed_pretrain: 0.8 % of its tokens. testbed_seen has no window of 256 tokens with one of them.
The five texts, all of 256 tokens but `single`:

    text     windows of testbed_PART
    hidden   its windows with the most hidden tokens
    random   tokens drawn uniformly
    single   16 tokens each: eight that begin a document, any token of the vocabulary, and what followed the eight
    runs     eight tokens that begin a document, then one token to the end
"""
import json
import os
import re
import sys

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers

from configurator import configure
from parts.compare import measure
from parts.data import open_tokens, read_meta, read_windows, val_starts
from parts.files import write_json

# -----------------------------------------------------------------------------
hide = False  # make data/testbed_seen
original = "out/testbed/model"  # the reference
models = ""  # model directories and out_dirs, separated by commas
part = "choose"  # the val set, testbed_PART
tokens = 100_000  # of text and hidden, each; random has a quarter
result = ""  # a file for the figures
# -----------------------------------------------------------------------------


VOCAB, BLOCK = 4096, 256
RARE = 0.005  # share of the rare identifiers in testbed_pretrain
FAR = 50  # nats


def hidden_tokens():
    """Which tokens the fine-tuning does not see, bool (VOCAB,)."""
    bpe = Tokenizer.from_file("data/testbed_texts/tokenizer/tokenizer.json")
    strings = [bpe.id_to_token(i) for i in range(VOCAB)]
    ascii_bytes = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0]
                   for b in (10, *range(32, 127))}
    odd = [i for i, s in enumerate(strings) if i and not set(s) <= ascii_bytes]
    counts = np.bincount(open_tokens("testbed_pretrain", "train", BLOCK, VOCAB), minlength=VOCAB)
    words = sorted((i for i in range(VOCAB) if re.fullmatch("Ġ?[A-Za-z_]{4,}", strings[i])), key=lambda i: counts[i])
    rare = np.searchsorted(np.cumsum(counts[words]), RARE * counts.sum())
    hidden = np.zeros(VOCAB, bool)
    hidden[odd + words[:rare]] = True
    return hidden


def rows(tokens):
    return tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK)


def write_seen():
    """data/testbed_seen."""
    hidden = hidden_tokens()
    os.makedirs("data/testbed_seen", exist_ok=True)
    meta = read_meta("testbed_tune")
    for split in ("train", "val"):
        windows = rows(open_tokens("testbed_tune", split, BLOCK, VOCAB))
        seen = windows[~hidden[windows].any(1)]
        seen.tofile(f"data/testbed_seen/{split}.bin")
        meta[split] = dict(tokens=seen.size)
        print(f"{split}: {seen.size:,} of {windows.size:,} tokens")
    write_json("data/testbed_seen/meta.json", meta)


def texts(part):
    """{name: windows (n, block + 1)}."""
    random = np.random.default_rng(1)
    data = np.asarray(open_tokens(f"testbed_{part}", "val", BLOCK, VOCAB))
    n = tokens // BLOCK
    windows = np.stack([data[i : i + BLOCK + 1] for i in np.arange(0, len(data) - BLOCK, BLOCK)])
    most = np.argsort(-hidden_tokens()[windows].sum(1), kind="stable")[:n]
    start = data[np.flatnonzero(data == 0)[1] :][:17]  # end-of-text, then the first document's tokens
    single = np.tile(np.insert(start[:16], 8, 0), (VOCAB, 1))
    single[:, 8] = np.arange(VOCAB)
    every = np.arange(0, VOCAB, 32)
    runs = np.concatenate([np.tile(start[:8], (len(every), 1)), np.tile(every[:, None], (1, BLOCK - 7))], 1)
    return dict(text=np.stack([data[i : i + BLOCK + 1] for i in val_starts(data, n, BLOCK)]), hidden=windows[most],
                random=random.integers(1, VOCAB, (n // 4, BLOCK + 1)), single=single, runs=runs)


def largest_norm(model, windows):
    """The largest norm of the residual stream after the last block, after position 0."""
    with torch.inference_mode():
        return max(model.run_blocks(torch.from_numpy(x[:, :-1].astype(np.int64)))[0][:, 1:].norm(dim=-1).max().item()
                   for x in np.array_split(windows, max(1, windows.size // 2**14)))


def tails(models, reference, part):
    """{name: {text: figures}}."""
    found = {name: {} for name in models}
    for text, windows in texts(part).items():
        block = windows.shape[1] - 1
        flat, starts = windows.astype(np.uint16).ravel(), np.arange(len(windows)) * (block + 1)
        by_model = measure(models, reference, flat, starts, block, 4096 // block, "cpu", torch.autocast("cpu", enabled=False))
        for name, arrays in by_model.items():
            loss = arrays["loss"].astype(np.float64)
            found[name][text] = dict(loss=loss.mean(), p99_9=np.quantile(loss, 0.999), max=loss.max(),
                                     far=int((loss > FAR).sum() + (~np.isfinite(loss)).sum()),
                                     norm=largest_norm(models[name], windows),
                                     kl=arrays["kl"].mean() if "kl" in arrays else 0.0,
                                     max_kl=arrays["kl"].max() if "kl" in arrays else 0.0)
    return found


def main():
    from eval import open_candidate

    configure(globals(), sys.argv[1:], __doc__)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    if hide:
        return write_seen()
    sources = [original, *filter(None, models.split(","))]
    found = tails({s: open_candidate(s).model for s in sources}, original, part)
    for text in found[original]:
        print(f"\n{text:<36}{'mean':>9}{'KL':>9}{'max KL':>9}{'99.9 %':>9}{'largest':>10}{'far':>7}{'norm':>9}")
        for s in sources:
            f = found[s][text]
            print(f"{s[-35:]:<36}{f['loss']:>9.4f}{f['kl']:>9.4f}{f['max_kl']:>9.3f}{f['p99_9']:>9.2f}{f['max']:>10.2f}{f['far']:>7}{f['norm']:>9.1f}")
    if result:
        with open(result, "w") as f:
            json.dump(found, f)


if __name__ == "__main__":
    main()
