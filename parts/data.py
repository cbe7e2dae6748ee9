"""
Token files to batches: data/NAME/{train,val}.bin, raw uint16, with a meta.json beside them.
prepare_owt.py writes them.
"""
import hashlib
import os

import numpy as np
import torch

from parts import jsonfile
from parts.errors import UserError, on_disk

CHUNK = 2**25  # tokens that are looked at at a time


def folder_of(dataset):
    """data/DATASET. UserError: a name that leads elsewhere."""
    if dataset in ("", ".", "..") or os.path.basename(dataset) != dataset:
        raise UserError(f"dataset {dataset!r} is not the name of a folder below data/")
    return os.path.join("data", dataset)


def read_meta(dataset):
    """The dict in data/DATASET/meta.json. UserError if the data set is not prepared."""
    path = os.path.join(folder_of(dataset), "meta.json")
    if not os.path.lexists(path) and not os.path.isfile("data"):
        raise UserError(f"{path} is not there: run `python prepare_owt.py --dataset={dataset}` first")
    split = {"tokens?": (0, 2**53), "documents?": (0, 2**53), "sha256?": str}
    texts = {"tokenizer?": str, "source?": str}
    fields = {"vocab_size": (1, 2**16), "eot": (0, 2**16 - 1), "train": split, "val": split} | texts
    return jsonfile.read(path, fields, again(dataset))


def token_word(dataset):
    """What a token of data/DATASET is, as tables and pictures name it: byte or token."""
    return "byte" if read_meta(dataset).get("tokenizer") == "bytes" else "token"


def again(dataset):
    return f"run `python prepare_owt.py --dataset={dataset} --force`"


def open_tokens(dataset, split, block_size, vocab_size):
    """data/DATASET/SPLIT.bin as a read-only uint16 array (tokens,), mapped and not read. UserError
    if it has another size than its meta.json says, no window of block_size, or ids that a model of vocab_size does
    not know."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    check_size(path, meta[split].get("tokens"), block_size, dataset)
    if meta["vocab_size"] > vocab_size:
        raise UserError(f"{path} holds token ids up to {meta['vocab_size'] - 1}, but the model's vocabulary has "
                        f"{vocab_size}: prepare it with the model's tokenizer")
    with on_disk(f"can't read {path}"):
        return np.memmap(path, dtype="<u2", mode="r")


def check_tokens(dataset, split):
    """Read data/DATASET/SPLIT.bin once. UserError if an id is none of its vocabulary, or if it is not the file that
    meta.json has the sha256 of."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    with on_disk(f"can't read {path}"):
        tokens = np.memmap(path, dtype="<u2", mode="r")
    digest = hashlib.sha256()
    for i in range(0, len(tokens), CHUNK):
        chunk = tokens[i : i + CHUNK]
        if chunk.max() >= meta["vocab_size"]:
            at = i + int((chunk >= meta["vocab_size"]).argmax())
            raise UserError(f"{path} holds the id {tokens[at]} at token {at:,}, but its vocabulary has "
                            f"{meta['vocab_size']:,}: {again(dataset)}")
        digest.update(chunk)
    if meta[split].get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise UserError(f"{path} is not the file that was prepared: its sha256 is not meta.json's; {again(dataset)}")


def check_size(path, expected, block_size, dataset):
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: {again(dataset)}")
    size = os.path.getsize(path)
    if size == 0:
        raise UserError(f"{path} is empty: {again(dataset)}")
    if size % 2:
        raise UserError(f"{path} has {size} bytes, an odd number, so it does not hold uint16 tokens: {again(dataset)}")
    if expected is not None and size != 2 * expected:
        raise UserError(f"{path} has {size // 2} tokens, but meta.json says {expected}: {again(dataset)}")
    if size // 2 < block_size + 1:
        raise UserError(f"{path} has {size // 2} tokens, fewer than block_size + 1 = {block_size + 1}: "
                        "lower block_size, or prepare more text")


def train_starts(tokens, seed, step, n, block_size):
    """First positions (n,) of the windows of a global batch: random, and a pure function of (seed,
    step)."""
    return np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, size=n)


def val_starts(tokens, n, block_size):
    """First positions (at most n,) of windows spread evenly over the tokens: always the same,
    without overlap."""
    n = min(n, (len(tokens) - 1) // block_size)
    return np.arange(n) * ((len(tokens) - 1) // n)


def read_windows(tokens, starts, block_size, device):
    """Inputs and targets, (len(starts), block_size) int64 each, on the device. Target t is the
    token after input t."""
    windows = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int64)
    x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)
