"""
JSON, ours and others': read, and held against what should be in it. Whatever is wrong with it is one
line with the file's name.
"""
import json
import os

from parts.errors import UserError, on_disk

LARGEST = 20_000_000  # bytes of a file, or of a line
WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", float: "a number"}


def parse(text):
    """The value of a JSON text; NaN and Infinity, which JSON does not have, are None. ValueError: whatever
    is wrong with it."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path, fields, advice):
    """The dict in a JSON file, with these fields as `check` says them. UserError, which ends with the
    advice."""
    refuse_devices(path)
    with on_disk(f"can't read {path}"), open(path, "rb") as f:
        text = f.read(LARGEST + 1)
    try:
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        content = parse(text)
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({str(e)[:80]}): {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {shown(content)}, not an object: {advice}")
    check(path, content, fields, advice)
    return content


def refuse_devices(path):
    """And pipes, which can be read for ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is not a file")


def check(where, content, fields, advice):
    """UserError unless the dict has these fields, {name: kind}. A kind is a type, of which float is any finite
    number; (low, high), an integer in this range; or another such dict. A name that ends in ? may be missing."""
    for name, kind in fields.items():
        key = name.removesuffix("?")
        value = content.get(key)
        if value is None and key != name:
            continue
        if value is None:
            raise UserError(f"{where}: {key} is missing: {advice}")
        if not fits(value, kind):
            raise UserError(f"{where}: {key} is {shown(value)}, not {in_words(kind)}: {advice}")
        if isinstance(kind, dict):
            check(f"{where}: {key}", value, kind, advice)


def kind_of(kind):
    return dict if isinstance(kind, dict) else kind


def in_words(kind):
    if isinstance(kind, tuple):
        return f"an integer from {kind[0]} on" if kind[1] > 2**31 else f"an integer from {kind[0]} to {kind[1]}"
    return WORDS[kind_of(kind)]


def fits(value, kind):
    if isinstance(kind, tuple):
        return type(value) is int and kind[0] <= value <= kind[1]
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return isinstance(value, kind_of(kind))


def shown(value):
    if value is None:
        return "null"
    for kind in (dict, list):
        if isinstance(value, kind):
            return f"{WORDS[kind]} of {len(value)}"
    return repr(value)[:40]


def read_dict(path):
    """The dict in a JSON file; {} if it is not there or holds something else."""
    try:
        return read(path, {}, "")
    except UserError:
        return {}


def read_lines(path, fields, advice):
    """Yields (line, dict) of a file with a dict of these fields on each line, as a log; of a last line that is
    not whole, as a kill leaves it, nothing. UserError that names the line."""
    refuse_devices(path)
    with on_disk(f"can't read {path}"), open(path, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(LARGEST), b""), 1):
            if not line.endswith(b"\n"):
                if len(line) == LARGEST:
                    raise UserError(f"{path}, line {n} is too long: {advice}")
                return
            try:
                entry = parse(line)
            except ValueError as e:
                raise UserError(f"{path}, line {n} is not JSON ({str(e)[:80]}): {advice}") from None
            if not isinstance(entry, dict):
                raise UserError(f"{path}, line {n} is {shown(entry)}, not an object: {advice}")
            check(f"{path}, line {n}", entry, fields, advice)
            yield line, entry
