"""
Tokenizers: text to token ids, and back.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tiktoken

from parts.errors import UserError


@dataclass
class Tokenizer:
    name: str
    vocab_size: int
    eot: int
    encode: Callable | None = None  # text or UTF-8 bytes -> uint16 array; None: it is not known here
    decode: Callable | None = None  # a token id -> its bytes


def make_tokenizer(name):
    """The Tokenizer `gpt2` or `bytes`, or one of which just the ids are known, VOCAB_SIZE:EOT. UserError."""
    if re.fullmatch(r"\d+:\d+", name):
        vocab_size, eot = map(int, name.split(":"))
        if not eot < vocab_size <= 2**16:
            raise UserError(f"--tokenizer={name}: end-of-text must be below the vocabulary's size, "
                            f"and that at most {2**16:,}, as tokens are uint16")
        return Tokenizer(name, vocab_size, eot)
    if name == "bytes":
        return Tokenizer(name, 257, 256, encode_bytes, lambda token: bytes([token]))
    if name != "gpt2":
        raise UserError(f"unknown tokenizer {name!r}: it is bytes, gpt2 or, for rows of token ids, "
                        "VOCAB_SIZE:EOT as 4096:1")
    try:
        bpe = tiktoken.get_encoding("gpt2")  # fetched once
    except OSError as e:
        raise UserError(f"tiktoken can't fetch GPT-2's vocabulary ({type(e).__name__}): fetch it where there "
                        "is a network, and set TIKTOKEN_CACHE_DIR to its folder") from None

    def encode(content):  # what encode_ordinary gives, without its list
        text = content.decode() if isinstance(content, bytes) else content
        return bpe.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    return Tokenizer(name, bpe.n_vocab, bpe.eot_token, encode, bpe.decode_single_token_bytes)


def encode_bytes(content):
    data = content if isinstance(content, bytes) else content.encode()
    return np.frombuffer(data, dtype=np.uint8).astype("<u2")


def tokenizer_of(model, source):
    """The Tokenizer that a model must have by its end-of-text id. UserError, with the model's source, if
    that is neither GPT-2's nor that of bytes."""
    names = {50256: "gpt2", 256: "bytes"}
    eot = model.config.eot
    if eot >= model.config.vocab_size:  # GPT2Config says 50256 of any vocabulary
        raise UserError(f"{source} has no tokenizer that is known here: its config.json says end-of-text "
                        f"{eot}, which is none of its {model.config.vocab_size} ids")
    if eot not in names:
        raise UserError(f"{source} has no tokenizer that is known here: its end-of-text is {eot}, "
                        "neither GPT-2's 50256 nor 256, that of bytes")
    return make_tokenizer(names[eot])
