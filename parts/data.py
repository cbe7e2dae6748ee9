"""
Token files to batches: data/NAME/{train,val}.bin, raw uint16, with a meta.json beside them.
prepare_owt.py writes them.
"""
import json
import os

import numpy as np
import torch

from parts.errors import UserError, on_disk


def read_meta(dataset):
    """The dict in data/DATASET/meta.json. UserError if the data set is not prepared."""
    path = os.path.join("data", dataset, "meta.json")
    try:
        with open(path) as f:
            meta = json.load(f)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run `python prepare_owt.py --dataset={dataset}` first") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): {again(dataset)}") from None
    except OSError as e:
        raise UserError(f"can't read {path}: {e.strerror}") from None
    kinds = dict(vocab_size=int, eot=int, train=dict, val=dict)
    if not isinstance(meta, dict) or not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} has no vocab_size, eot, train or val: {again(dataset)}")
    return meta


def token_word(dataset):
    """What a token of data/DATASET is, as tables and pictures name it: byte or token."""
    return "byte" if read_meta(dataset).get("tokenizer") == "bytes" else "token"


def again(dataset):
    return f"run `python prepare_owt.py --dataset={dataset} --force`"


def open_tokens(dataset, split, block_size, vocab_size):
    """data/DATASET/SPLIT.bin as a read-only uint16 array (tokens,), mapped and not read. UserError
    if it is not what its meta.json says, has no window of block_size, or holds ids that a model of
    vocab_size does not know."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    check_size(path, meta[split].get("tokens"), block_size, dataset)
    with on_disk(f"can't read {path}"):
        tokens = np.memmap(path, dtype="<u2", mode="r")
    largest = max(int(tokens.max()), meta["vocab_size"] - 1)
    if largest >= vocab_size:
        raise UserError(f"{path} holds token ids up to {largest}, but the model's vocabulary has {vocab_size}: "
                        "prepare it with the model's tokenizer")
    return tokens


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
