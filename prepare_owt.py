"""
Text to tokens, once: data/NAME/{train,val}.bin (uint16) and meta.json.

    python prepare_owt.py                                              # stdlib: this Python's own source, as bytes
    python prepare_owt.py --dataset=mytext --files='a.txt,dir/*.md'    # local text files, as bytes
    python prepare_owt.py --dataset=mytext --files='dir/**/*.txt' --tokenizer=gpt2

A document is a file, and each is followed by the end-of-text id. About 5 % of the files are val, chosen by a hash of their path;
where that leaves a side empty (few files), the last 5 % of every file is val.
"""
import glob
import hashlib
import json
import os
import shutil
import sys
import sysconfig

import numpy as np
import tiktoken
from tqdm import tqdm

from configurator import configure, one_line_errors

# -----------------------------------------------------------------------------
dataset = ""  # the folder under data/; by default stdlib, or `files` when --files is given
files = ""  # comma-separated paths and patterns of local text files
tokenizer = "bytes"  # bytes (ids 0-255, end-of-text 256) or gpt2 (BPE, end-of-text 50256)
force = False  # prepare again what is prepared already
# -----------------------------------------------------------------------------

VAL_SHARE = 0.05


def stdlib_files():
    """[(name, path)] of the standard library's .py files, without tests, installed packages and caches, sorted by name."""
    root = sysconfig.get_path("stdlib")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d not in skip]
        for path in (os.path.join(folder, n) for n in names if n.endswith(".py")):
            found.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    return sorted(found)


def local_files(patterns):
    """[(name, path)] of the files that the comma-separated patterns match, sorted; ValueError if one matches none."""
    found = set()
    for pattern in filter(None, patterns.split(",")):
        paths = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not paths:
            raise ValueError(f"--files: no file matches {pattern!r}")
        found.update(paths)
    return [(path, path) for path in sorted(found)]


def is_val(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < VAL_SHARE * 2**64


def make_encoder(tokenizer):
    """(text as bytes -> uint16 array, vocab_size, eot) of a tokenizer by name."""
    if tokenizer == "bytes":
        return lambda text: np.frombuffer(text, dtype=np.uint8).astype("<u2"), 257, 256
    if tokenizer != "gpt2":
        raise ValueError(f"unknown tokenizer {tokenizer!r}: it is bytes or gpt2")
    bpe = tiktoken.get_encoding("gpt2")  # fetched once, an OSError without a network
    return lambda text: np.array(bpe.encode_ordinary(text.decode()), dtype="<u2"), bpe.n_vocab, bpe.eot_token


def documents(found, encode):
    """Yields ("train" or "val", tokens) for each of the (name, path)."""
    names = [name for name, _ in found]
    whole = 0 < sum(map(is_val, names)) < len(names)  # else every file is cut
    for name, path in tqdm(found, unit="file", disable=None):
        with open(path, "rb") as f:
            text = f.read()
        try:
            tokens = encode(text)
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text ({e}): use --tokenizer=bytes, or leave it out") from None
        if whole:
            yield "val" if is_val(name) else "train", tokens
        else:
            cut = len(tokens) - int(len(tokens) * VAL_SHARE)
            yield "train", tokens[:cut]
            yield "val", tokens[cut:]


def write(docs, eot, folder, meta):
    """Write the token files and meta.json into a new folder."""
    counts = {split: dict(tokens=0, documents=0) for split in ("train", "val")}
    hashes = {split: hashlib.sha256() for split in counts}
    out = {split: open(os.path.join(folder, split + ".bin"), "wb") for split in counts}
    for split, tokens in docs:
        data = np.append(tokens, eot).astype("<u2").tobytes()
        out[split].write(data)
        hashes[split].update(data)
        counts[split]["tokens"] += len(tokens) + 1
        counts[split]["documents"] += 1
    for f in out.values():
        f.flush()
        os.fsync(f.fileno())
        f.close()
    meta |= {split: counts[split] | dict(sha256=hashes[split].hexdigest()) for split in counts}
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f, indent=2)
    return meta


def main():
    configure(globals(), sys.argv[1:], __doc__)
    if not files and dataset not in ("", "stdlib"):
        sys.exit(f"error: no source for {dataset!r}: give --files='a.txt,dir/*.md', or prepare stdlib")
    if files and dataset == "stdlib":
        sys.exit("error: stdlib is Python's own source; give the files another name with --dataset=NAME")
    name = dataset or ("files" if files else "stdlib")
    if name != os.path.basename(name) or name in (".", ".."):
        sys.exit(f"error: --dataset={name} must be a plain folder name under data/")
    folder, half = os.path.join("data", name), os.path.join("data", name + ".tmp")
    with one_line_errors():
        encode, vocab_size, eot = make_encoder(tokenizer)
        found = local_files(files) if files else stdlib_files()
        meta = dict(tokenizer=tokenizer, vocab_size=vocab_size, eot=eot, source=files or f"stdlib of Python {sys.version.split()[0]}")
        if os.path.exists(os.path.join(folder, "meta.json")) and not force:
            with open(os.path.join(folder, "meta.json")) as f:
                done = json.load(f)
            differs = [key for key in meta if done.get(key) != meta[key]]
            if differs:
                raise ValueError(f"{folder} holds {differs[0]} {done.get(differs[0])!r}, not {meta[differs[0]]!r}: --force replaces it, --dataset=NAME puts this elsewhere")
            print(f"{folder} is prepared already: {done['train']['tokens']:,} train and {done['val']['tokens']:,} val tokens (--force redoes it)")
            return
        shutil.rmtree(half, ignore_errors=True)  # what a killed run left
        try:
            os.makedirs(half)
            meta = write(documents(found, encode), eot, half, meta)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    for split in ("train", "val"):
        print(f"{folder}/{split}.bin: {meta[split]['tokens']:,} tokens, {meta[split]['documents']:,} documents")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
