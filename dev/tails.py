"""
The tails of a model's losses: what it does with tokens that its fine-tuning never saw. Without LN, nothing bounds their
residual stream. `python -m dev.tails` writes data/testbed_seen, which is testbed_tune without the windows of 256 tokens
that have a hidden one; dev/ablations.py measures the tails.

Hidden tokens are those with control characters (a tab, a carriage return) or bytes beyond ASCII, and the rarest
identifiers of testbed_pretrain. They are 0.8 % of its tokens.
"""
import os
import re
import sys

from parts.errors import begin_script, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from configurator import configure
from parts.compare import measure
from parts.data import open_tokens, read_meta, val_starts
from parts.files import write_json

VOCAB, BLOCK = 4096, 256
RARE = 0.005  # the rarest identifiers are hidden, up to this share of testbed_pretrain
FAR = 50  # nats


def tokenizer():
    """The testbed's, a tokenizers.Tokenizer. UserError if it can't be read."""
    path = "data/testbed_texts/tokenizer/tokenizer.json"
    with reading(path):
        return Tokenizer.from_file(path)


def hidden_tokens():
    """Which tokens the fine-tuning never sees, bool (VOCAB,)."""
    bpe = tokenizer()
    tokens = [bpe.id_to_token(i) for i in range(VOCAB)]
    plain = {ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0] for b in (10, *range(32, 127))}
    odd = [i for i, token in enumerate(tokens) if not set(token) <= plain]
    counts = np.bincount(open_tokens("testbed_pretrain", "train", BLOCK, VOCAB), minlength=VOCAB)
    words = sorted((i for i in range(VOCAB) if re.fullmatch("Ġ?[A-Za-z_]{4,}", tokens[i])), key=counts.__getitem__)
    n = np.searchsorted(counts[words].cumsum(), RARE * counts.sum())
    hidden = np.zeros(VOCAB, bool)
    hidden[odd + words[:n]] = True
    return hidden


def write_seen():
    """data/testbed_seen."""
    hidden, meta = hidden_tokens(), read_meta("testbed_tune")
    os.makedirs("data/testbed_seen", exist_ok=True)
    for split in ("train", "val"):
        tokens = open_tokens("testbed_tune", split, BLOCK, VOCAB)
        windows = tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK)
        seen = windows[~hidden[windows].any(1)]
        seen.tofile(f"data/testbed_seen/{split}.bin")
        meta[split] = dict(tokens=seen.size)
        print(f"data/testbed_seen/{split}.bin: {seen.size:,} of {len(tokens):,} tokens")
    write_json("data/testbed_seen/meta.json", meta)


def texts(part, tokens):
    """{name: windows (n, T + 1)} of the val set testbed_PART, its packages' own text first:

    text: its windows, `tokens` in all; T is 256
    hidden: as many of its windows, those with the most hidden tokens
    random: tokens drawn uniformly, a quarter as many; the same for each part
    single: the first 8 tokens of a document, then any token of the vocabulary, then what followed the 8; T is 16
    runs: the same 8, then one token to the end, for every 32nd token of the vocabulary"""
    data = np.asarray(open_tokens(f"testbed_{part}", "val", BLOCK, VOCAB))
    n = tokens // BLOCK
    windows = np.lib.stride_tricks.sliding_window_view(data, BLOCK + 1)
    all_windows = windows[::BLOCK]
    most = np.argsort(-hidden_tokens()[all_windows].sum(1), kind="stable")[:n]
    begin = data[np.flatnonzero(data == 0)[1] :][:16]  # end-of-text, and the document after it
    single = np.stack([np.insert(begin, 8, token) for token in range(VOCAB)])
    runs = np.stack([np.append(begin[:8], [token] * (BLOCK - 7)) for token in range(0, VOCAB, 32)])
    random = np.random.default_rng(1).integers(1, VOCAB, (n // 4, BLOCK + 1))
    return dict(text=windows[val_starts(data, n, BLOCK)], hidden=all_windows[most], random=random, single=single,
                runs=runs)


def tails(models, original, part, tokens):
    """{(model's name, text): figures}: the mean loss in nats, its 99.9th percentile and largest, `far`: how many are
    above 50 nats or not finite, the mean KL(original || model), and the largest norm of the residual stream after the
    last block, of tokens after position 0. models: {name: GPT}; original: one of the names."""
    found = {}
    for text, windows in texts(part, tokens).items():
        T = windows.shape[1] - 1
        starts, plain = np.arange(len(windows)) * (T + 1), torch.autocast("cpu", enabled=False)
        measured = measure(models, original, windows.ravel(), starts, T, 2**12 // T, "cpu", plain)
        for name, by_token in measured.items():
            loss = by_token["loss"].astype(np.float64)
            found[name, text] = dict(loss=loss.mean(), kl=by_token["kl"].mean() if name != original else 0.0,
                                     p99_9=np.quantile(loss, 0.999), max=loss.max(), far=int((~(loss <= FAR)).sum()),
                                     norm=largest_norm(models[name], windows[:, :-1]))
    return found


@torch.inference_mode()
def largest_norm(model, windows):
    norms = []
    for x in np.array_split(windows, 1 + windows.size // 2**14):
        stream, _ = model.run_blocks(torch.from_numpy(x.astype(np.int64)))
        norms.append(stream[:, 1:].norm(dim=-1).max().item())
    return max(norms)


if __name__ == "__main__":
    configure(globals(), sys.argv[1:], __doc__)
    write_seen()
