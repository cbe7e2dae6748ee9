"""
Tokenizers: text to token ids, and back. GPT-2's, bytes, or the one that stands beside a model.
"""
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tiktoken

from parts.errors import UserError, on_disk
from parts.files import read_dict

# what transformers may want of a tokenizer beside a model
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass
class Tokenizer:
    name: str
    vocab_size: int
    eot: int
    encode: Callable | None = None  # text or UTF-8 bytes -> uint16 array; None: it is not known here
    decode: Callable | None = None  # a list of token ids -> text
    sha256: str = ""  # of a tokenizer.json


def make_tokenizer(name):
    """The Tokenizer `gpt2` or `bytes`; of a directory with a tokenizer.json, or a hub repository
    ORG/NAME; or one of which just the ids are known, VOCAB_SIZE:EOT. UserError."""
    if re.fullmatch(r"\d+:\d+", name):
        vocab_size, eot = map(int, name.split(":"))
        check_size(f"--tokenizer={name}", vocab_size, eot)
        return Tokenizer(name, vocab_size, eot)
    if name == "bytes":
        return Tokenizer(name, 257, 256, encode_bytes, lambda ids: bytes(ids).decode(errors="replace"))
    if name == "gpt2":
        return gpt2_tokenizer()
    directory = directory_of(name)
    if directory is None:
        raise UserError(f"unknown tokenizer {name!r}: it is bytes, gpt2, a directory or hub repository with "
                        "a tokenizer.json or, for rows of token ids, VOCAB_SIZE:EOT as 4096:1")
    return read_tokenizer(name, directory)


def check_size(what, vocab_size, eot):
    if not 0 <= eot < vocab_size <= 2**16:
        raise UserError(f"{what}: end-of-text must be below the vocabulary's size, and that at most {2**16:,}, "
                        "as tokens are uint16")


def encode_bytes(content):
    data = content if isinstance(content, bytes) else content.encode()
    return np.frombuffer(data, dtype=np.uint8).astype("<u2")


def gpt2_tokenizer():
    try:
        bpe = tiktoken.get_encoding("gpt2")  # fetched once
    except OSError as e:
        raise UserError(f"tiktoken can't fetch GPT-2's vocabulary ({type(e).__name__}): fetch it where there "
                        "is a network, and set TIKTOKEN_CACHE_DIR to its folder") from None

    def encode(content):  # what encode_ordinary gives, without its list
        text = content.decode() if isinstance(content, bytes) else content
        return bpe.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    return Tokenizer("gpt2", bpe.n_vocab, bpe.eot_token, encode, bpe.decode)


def read_tokenizer(name, directory):
    """The Tokenizer in a directory's tokenizer.json. End-of-text is tokenizer_config.json's eos_token, or
    config.json's eos_token_id. UserError."""
    import tokenizers

    path = os.path.join(directory, "tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # tokenizers raises no other kind
        raise UserError(f"{path} can't be read: {str(e).splitlines()[0]}") from None
    tokenizer.encode_special_tokens = True  # text that spells a special token stays text
    tokenizer.no_truncation()  # as a file may ask for: a document is taken whole
    tokenizer.no_padding()
    eos = read_dict(os.path.join(directory, "tokenizer_config.json")).get("eos_token")
    if isinstance(eos, dict):
        eos = eos.get("content")
    eot = tokenizer.token_to_id(eos) if isinstance(eos, str) else None
    if eot is None:
        eot = read_dict(os.path.join(directory, "config.json")).get("eos_token_id")
    if type(eot) is not int:
        raise UserError(f"{directory}: neither tokenizer_config.json nor config.json names an eos_token, "
                        "so there is no end-of-text to put after a document")
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    check_size(path, vocab_size, eot)

    def encode(content):
        text = content.decode() if isinstance(content, bytes) else content
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype="<u2")

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False)

    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return Tokenizer(name, vocab_size, eot, encode, decode, sha256)


def directory_of(source):
    """The directory here with the tokenizer.json of a model directory or hub repository; None: it has
    none, or can't be reached."""
    if os.path.exists(os.path.join(source, "tokenizer.json")):
        return source
    if os.path.isdir(source) or source.count("/") > 1 or source.startswith((".", "/", "~")):
        return None
    import huggingface_hub as hub

    repo, _, revision = source.partition("@")
    directory = None
    for file in FILES:
        try:
            path = hub.hf_hub_download(repo, file, revision=revision or None)
        except Exception:  # of many kinds: it is not there, or can't be asked
            if file == "tokenizer.json":
                return None
            continue
        directory = os.path.dirname(path)
    return directory


def tokenizer_of(model, source):
    """The Tokenizer of a model from `source`: that which stands beside it, else GPT-2's or bytes by its
    end-of-text id. UserError."""
    config = model.config
    directory = source if os.path.isdir(source) else None
    if config.eot not in (50256, 256) or config.eot >= config.vocab_size:
        directory = directory_of(source)
    if directory is not None and os.path.exists(os.path.join(directory, "tokenizer.json")):
        found = read_tokenizer(directory, directory)
    elif config.eot >= config.vocab_size:  # GPT2Config says 50256 of any vocabulary
        raise UserError(f"{source} has no tokenizer that is known here: its config.json says end-of-text "
                        f"{config.eot}, which is none of its {config.vocab_size} ids")
    elif config.eot not in (50256, 256):
        raise UserError(f"{source} has no tokenizer that is known here: its end-of-text is {config.eot}, neither "
                        "GPT-2's 50256 nor 256, that of bytes, and no tokenizer.json stands beside it")
    else:
        found = make_tokenizer("gpt2" if config.eot == 50256 else "bytes")
    if found.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer of {source} has {found.vocab_size} ids, but the model knows "
                        f"{config.vocab_size}")
    return found


def copy_tokenizer(source, directory):
    """Copy the tokenizer files that stand beside the model `source`, if any, into a directory. Whether
    there are any."""
    there = directory_of(source)
    if there is None:
        return False
    with on_disk(f"can't copy the tokenizer of {source}"):
        for file in FILES:
            if os.path.exists(os.path.join(there, file)):
                shutil.copyfile(os.path.join(there, file), os.path.join(directory, file))
    return True


def remove_copied_tokenizer(source, directory):
    """Remove what copy_tokenizer copied from source: just files that are there to the same bytes."""
    there = directory_of(source)
    for file in FILES if there else ():
        original, copy = os.path.join(there, file), os.path.join(directory, file)
        both = os.path.exists(original) and os.path.exists(copy)
        if both and not os.path.samefile(original, copy) and filecmp.cmp(original, copy, shallow=False):
            os.remove(copy)
