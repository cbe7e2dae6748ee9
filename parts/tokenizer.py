"""
Tokenizers: text to token ids, and back. GPT-2's, bytes, or a model's own.
"""
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken

from parts.errors import UserError, on_disk, reading
from parts.fetch import TOKENIZER_FILES, fetch
from parts.files import read_json


PROBE = "def f(x):\n\treturn 12345.678 + x  # naïve café, Жук 東京 🙂\n\n\n    The quick brown FOX isn't lazy, is it?"
PROBES = dict(gpt2="5d821d4d08127f55", bytes="052d9a3a093edb20")  # fingerprints


@dataclass
class Tokenizer:
    name: str
    vocab_size: int
    eot: int
    encode: Callable | None = None  # text or UTF-8 bytes -> uint16 array; None: only the ids are known
    decode: Callable | None = None  # a list of token ids -> text
    sha256: str = ""  # hash of tokenizer.json, or of vocab.json and merges.txt
    special: tuple = ("<|endoftext|>",)  # texts of special tokens, which stay text when they are spelled in a document
    unk: int | None = None  # id of the unknown token

    def __post_init__(self):
        if not 0 <= self.eot < self.vocab_size <= 2**16:
            raise UserError(f"{self.name}: end-of-text is {self.eot}, and must be below the vocabulary's size; that is "
                            f"{self.vocab_size}, and must be at most {2**16:,}, because tokens are uint16")

    def fingerprint(self):
        """16 letters, the same for tokenizers of the same end-of-text and ids of PROBE; "" if it can't be encoded."""
        with suppress(UserError):
            if self.encode:
                ids = np.append(self.encode(PROBE), self.eot).astype("<u2")
                return hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        return ""

    def notes(self):
        """What a user should know about it."""
        notes = []
        if self.fingerprint() and self.decode(self.encode(PROBE).tolist()).strip() != PROBE:
            notes.append("the tokenizer loses text: it does not decode to what it encoded, such as capital letters")
        if self.sha256 and self.decode([self.eot]) not in self.special:
            notes.append(f"end-of-text, {self.decode([self.eot])!r}, is an ordinary token of the vocabulary")
        return notes


def make_tokenizer(name):
    """The Tokenizer `gpt2` or `bytes`, that of a directory or a hub repository, or VOCAB_SIZE:EOT, of which only the
    ids are known. UserError."""
    if re.fullmatch(r"\d+:\d+", name):
        return Tokenizer(name, *map(int, name.split(":")))
    if name == "bytes":
        def encode(content):
            data = content if isinstance(content, bytes) else content.encode()
            return np.frombuffer(data, np.uint8).astype("<u2")

        return Tokenizer(name, 257, 256, encode, lambda ids: bytes(ids).decode(errors="replace"))
    if name == "gpt2":
        try:
            bpe = tiktoken.get_encoding("gpt2")  # fetched once
        except OSError as e:
            raise UserError(f"tiktoken can't fetch GPT-2's vocabulary ({type(e).__name__}): fetch it where there "
                            "is a network, and set TIKTOKEN_CACHE_DIR to its folder") from None

        def encode(content):  # what encode_ordinary gives, without its list
            return bpe.encode_to_numpy(as_text(content), disallowed_special=()).astype("<u2")

        return Tokenizer("gpt2", bpe.n_vocab, bpe.eot_token, encode, bpe.decode)
    try:
        directory = fetch(name, weights=False)
    except UserError as e:
        raise UserError(f"the tokenizer {name!r} is not bytes, gpt2 or, for ids, VOCAB_SIZE:EOT; {e}") from None
    return read_tokenizer(name, directory)


def as_text(content):
    return content.decode() if isinstance(content, bytes) else content


def read_tokenizer(name, directory):
    """The Tokenizer of a directory's files, with the ids and the end-of-text of transformers' AutoTokenizer. A special
    token that is spelled in a text stays text. UserError."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def read(file):
        path = os.path.join(directory, file)
        return read_json(path) if os.path.lexists(path) else {}

    config, hf, whole = map(read, ("tokenizer_config.json", "config.json", "tokenizer.json"))
    default = "GPT2Tokenizer" if hf else "TokenizersBackend"
    kind = config.get("tokenizer_class") or hf.get("tokenizer_class") or default
    is_gpt2 = str(kind).removesuffix("Fast") == "GPT2Tokenizer"
    paths = [os.path.join(directory, f) for f in (["tokenizer.json"] if whole else ["vocab.json", "merges.txt"])]
    known = is_gpt2 or whole and kind in ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
    if not known or not all(map(os.path.exists, paths)) or {"auto_map", "fast_tokenizer_files"} & config.keys():
        raise UserError(f"{name} has no tokenizer.json that is read here as transformers reads it (its class is "
                        f"{kind}): with t its AutoTokenizer, save transformers.PreTrainedTokenizerFast("
                        "tokenizer_object=t.backend_tokenizer, eos_token=t.eos_token) in a copy of the model")
    with reading(paths[0]), reading(paths[-1]):
        if is_gpt2:  # transformers takes no more than these from any file
            model = whole.get("model") or dict(zip(("vocab", "merges"), models.BPE.read_file(*paths)))
            merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
            tokenizer = tokenizers.Tokenizer(models.BPE(model["vocab"], merges))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(bool(config.get("add_prefix_space", False)))
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer = tokenizers.Tokenizer.from_file(paths[0])
        added = config.get("added_tokens_decoder")
        if added is None:
            config |= read("special_tokens_map.json")
            added = {id: dict(content=token) for token, id in read("added_tokens.json").items()}
            added |= {token.pop("id"): token for token in whole.get("added_tokens", [])}
        added = {int(id): tokenizers.AddedToken(**token) for id, token in added.items()}
        tokenizer.add_tokens([added[id] for id in sorted(added)])
        for id, token in added.items():
            if tokenizer.token_to_id(token.content) != id:
                raise ValueError(f"the added token {token.content!r} can't have the id {id}")
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()  # as a file may ask for: a document is taken whole
        tokenizer.no_padding()
        eos = config.get("eos_token", "<|endoftext|>" if is_gpt2 else None)
        eot = tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos or "")
        if eot is None:
            raise ValueError(f"its eos_token is {eos!r}: name one of its tokens in tokenizer_config.json")
        sha256 = hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()

    def encode(content):
        with reading(paths[0]):  # such as a word without an unknown token
            # which releases Python's lock, as encode does not
            found = tokenizer.encode_batch_fast([as_text(content)], add_special_tokens=False)
            return np.array(found[0].ids, dtype="<u2")

    decode = partial(tokenizer.decode, skip_special_tokens=False)
    special = tuple(token.content for token in added.values() if token.special)
    unk = whole.get("model", {}).get("unk_token") if not is_gpt2 else None
    unk = tokenizer.token_to_id(unk) if isinstance(unk, str) else whole.get("model", {}).get("unk_id")
    return Tokenizer(name, max(tokenizer.get_vocab().values()) + 1, eot, encode, decode, sha256, special, unk)


def tokenizer_of(model, source):
    """The Tokenizer of a model from `source`. UserError."""
    found = make_tokenizer(tokenizer_name(model, source))
    if found.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer of {source} has {found.vocab_size} ids, its model {model.config.vocab_size}")
    return found


def tokenizer_name(model, source):
    """What make_tokenizer takes for a model from `source`: its directory, if that has tokenizer files; otherwise gpt2
    or bytes by its vocabulary, which may be padded. UserError."""
    eot, vocab_size, directory = model.config.eot, model.config.vocab_size, fetch(source, weights=False)
    if tokenizer_files(directory):
        return directory
    if eot == 50256 and 50257 <= vocab_size <= 51200:
        return "gpt2"
    if eot == 256 and 257 <= vocab_size <= 512:
        return "bytes"
    raise UserError(f"{source} has no tokenizer files, and its {vocab_size} ids with end-of-text {eot} are neither "
                    "GPT-2's nor bytes: put its tokenizer.json and tokenizer_config.json beside its config.json")


def fingerprint_of(model, source):
    """The fingerprint of the tokenizer of a model from `source`; "" if it is not known."""
    with suppress(UserError):
        name = tokenizer_name(model, source)
        return PROBES.get(name) or make_tokenizer(name).fingerprint()
    return ""


def check_data(dataset, meta, model, source, any_tokenizer):
    """A note, or "". UserError if data/DATASET, with meta.json `meta`, has tokens of another tokenizer than the model
    from `source`, as far as both are known."""
    of_data = meta.get("tokenizer_probe") or PROBES.get(meta.get("tokenizer"), "")
    of_model = fingerprint_of(model, source)
    if of_data and of_model:
        if of_data == of_model or any_tokenizer:
            return ""
        raise UserError(f"data/{dataset} has tokens of the tokenizer {meta['tokenizer']}, which is not that of "
                        f"{source}: prepare it with --tokenizer={source}, or pass --any_tokenizer")
    if model.config.eot == meta["eot"]:
        return ""
    return (f"note: end-of-text is {meta['eot']} in data/{dataset}, but {model.config.eot} in {source}: was it trained "
            "on such tokens?")


def tokenizer_files(directory):
    return [file for file in TOKENIZER_FILES if os.path.lexists(os.path.join(directory, file))]


def copy_tokenizer(source, directory):
    """Copy the tokenizer files of the model `source`, if it has any, into a directory. Whether it has any."""
    there = fetch(source, weights=False)
    files = tokenizer_files(there)
    with on_disk(f"can't copy the tokenizer of {source}"):
        for file in files:
            shutil.copyfile(os.path.join(there, file), os.path.join(directory, file))
    return bool(files)


def remove_copied_tokenizer(source, directory):
    """Remove what copy_tokenizer copied from source: files of the same bytes. Nothing, if source is gone."""
    for file in tokenizer_files(directory):
        with suppress(UserError):
            original, copy = os.path.join(fetch(source, weights=False), file), os.path.join(directory, file)
            both = os.path.isfile(original) and os.path.isfile(copy) and not os.path.samefile(original, copy)
            if both and filecmp.cmp(original, copy, shallow=False):
                os.remove(copy)
