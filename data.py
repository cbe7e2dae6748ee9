"""
What the scripts share: reading a prepared dataset, data/NAME/{train,val}.bin + meta.json, and the choice of a device.
"""
import json
import os

import numpy as np
import torch


def read_meta(dataset):
    """The dict in data/DATASET/meta.json. FileNotFoundError or ValueError, one line, if the data set is not prepared."""
    path = os.path.join("data", dataset, "meta.json")
    try:
        with open(path) as f:
            meta = json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: run `python prepare_owt.py --dataset={dataset}` first") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e}): run `python prepare_owt.py --dataset={dataset} --force`") from None
    kinds = dict(vocab_size=int, eot=int, train=dict, val=dict)
    if not isinstance(meta, dict) or not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} has no vocab_size, eot, train or val: run `python prepare_owt.py --dataset={dataset} --force`")
    return meta


def open_tokens(dataset, split, block_size, vocab_size):
    """data/DATASET/SPLIT.bin as a read-only uint16 array (tokens,), checked against its meta.json and the model's vocabulary."""
    meta = read_meta(dataset)
    path = os.path.join("data", dataset, split + ".bin")
    again = f"run `python prepare_owt.py --dataset={dataset} --force`"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is not there: {again}")
    size, expected = os.path.getsize(path), meta[split].get("tokens")
    if size == 0:
        raise ValueError(f"{path} is empty: {again}")
    if size % 2:
        raise ValueError(f"{path} has {size} bytes, an odd number, so it does not hold uint16 tokens: {again}")
    if expected is not None and size != 2 * expected:
        raise ValueError(f"{path} has {size // 2} tokens, but meta.json says {expected}: {again}")
    if size // 2 < block_size + 1:
        raise ValueError(f"{path} has {size // 2} tokens, fewer than block_size + 1 = {block_size + 1}: lower block_size, or prepare more text")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    largest = max(int(tokens.max()), meta["vocab_size"] - 1)
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token ids up to {largest}, but the model's vocabulary has {vocab_size}: prepare it with the model's tokenizer")
    return tokens


def train_starts(tokens, seed, step, n, block_size):
    """First positions (n,) of the windows of a global batch: random, and a pure function of (seed, step)."""
    return np.random.default_rng([seed, step]).integers(0, len(tokens) - block_size, size=n)


def val_starts(tokens, n, block_size):
    """First positions (at most n,) of windows spread evenly over the tokens: always the same, without overlap."""
    n = min(n, (len(tokens) - 1) // block_size)
    return np.arange(n) * ((len(tokens) - 1) // n)


def read_windows(tokens, starts, block_size, device):
    """Inputs and targets, (len(starts), block_size) int64 each, on the device."""
    windows = np.stack([tokens[i : i + block_size + 1] for i in starts]).astype(np.int64)
    x, y = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)


def pick_device(name):
    """`auto` (cuda, mps or cpu, the first that is there) or a device's name -> its name. ValueError if it is not on this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if not there.get(name.split(":")[0]):
        raise ValueError(f"device {name!r} is not on this machine: try --device=cpu")
    return name
