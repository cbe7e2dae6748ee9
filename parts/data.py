"""
Token files to batches: data/NAME/{train,val}.bin, raw little-endian uint16, and meta.json. prepare_owt.py writes them.
"""
import hashlib
import os

import numpy as np
import torch

from parts.errors import UserError, reading
from parts.files import read_dict, read_json

CHUNK = 2**25  # tokens that are checked at a time


def read_meta(dataset):
    """The dict in data/DATASET/meta.json. UserError if the data set is not prepared."""
    if dataset in ("", ".", "..") or os.path.basename(dataset) != dataset:
        raise UserError(f"dataset {dataset!r} is not the name of a folder in data/")
    path = os.path.join("data", dataset, "meta.json")
    if not os.path.lexists(path):
        enough = " --tokens=700_000_000" if dataset == "owt" else ""  # for a fine-tune
        raise UserError(f"{path} is not there: run `python prepare_owt.py --dataset={dataset}{enough}` first")
    meta = read_json(path, again(dataset))
    with reading(path, again(dataset)):
        if not 0 <= meta["eot"] < meta["vocab_size"] <= 2**16:
            raise ValueError(f"eot {meta['eot']} and vocab_size {meta['vocab_size']} are not those of a uint16 file")
        for split in ("train", "val"):
            meta[split].get("tokens")
    return meta


def token_word(dataset):
    """"byte" or "token", the unit of data/DATASET in tables and figures; "token" if the data set is gone."""
    meta = read_dict(os.path.join("data", dataset, "meta.json"))
    return "byte" if meta.get("tokenizer") == "bytes" else "token"


def again(dataset):
    return f"run `python prepare_owt.py --dataset={dataset} --force`"


def open_tokens(dataset, split, block_size, vocab_size):
    """data/DATASET/SPLIT.bin as a read-only uint16 array (tokens,), memory-mapped. UserError if it has another size
    than meta.json says, no window of block_size, or ids that a model of vocab_size does not know."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    with reading(path, again(dataset)):
        tokens = np.memmap(path, dtype="<u2", mode="r")  # an error if it is empty, or of an odd size
        expected = meta[split].get("tokens", len(tokens))
        if len(tokens) != expected:
            raise ValueError(f"it has {len(tokens)} tokens, but meta.json says {expected}")
    if len(tokens) < block_size + 1:
        raise UserError(f"{path} has {len(tokens)} tokens, fewer than block_size + 1: lower it, or prepare more text")
    if meta["vocab_size"] > vocab_size:
        raise UserError(f"{path} holds token ids up to {meta['vocab_size'] - 1}, but the model's vocabulary has "
                        f"{vocab_size}: prepare it with the model's tokenizer")
    return tokens


def check_tokens(dataset, split):
    """Read data/DATASET/SPLIT.bin once. UserError if an id is not in its vocabulary, or its sha256 not meta.json's."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    digest = hashlib.sha256()
    with reading(path, again(dataset)):
        tokens = np.memmap(path, dtype="<u2", mode="r")
        for i in range(0, len(tokens), CHUNK):
            chunk = tokens[i : i + CHUNK]
            if chunk.max() >= meta["vocab_size"]:
                raise ValueError(f"it has the id {chunk.max()}, but the vocabulary has {meta['vocab_size']:,}")
            digest.update(chunk)
        if meta[split].get("sha256", digest.hexdigest()) != digest.hexdigest():
            raise ValueError("it is not the file that was prepared: its sha256 is not meta.json's")


def train_starts(tokens, seed, step, n, block_size):
    """First positions (n,) of the windows of a global batch: random, and a pure function of (seed, step)."""
    return np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, size=n)


def val_starts(tokens, n, block_size):
    """First positions (at most n,) of windows spread evenly over the tokens without overlap, always the same."""
    n = min(n, (len(tokens) - 1) // block_size)
    return np.arange(n) * ((len(tokens) - 1) // n)


def read_windows(tokens, starts, block_size, device):
    """Inputs and targets, (len(starts), block_size) int64 each, on the device. Target t is the token after input t.
    UserError if the token file was written over: reading beyond its new end would kill the process."""
    path = getattr(tokens, "filename", None)
    if path and os.path.exists(path) and os.path.getsize(path) != tokens.nbytes:
        raise UserError(f"{path} was written over while it is in use")
    windows = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int64)
    x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)
