"""
Settings: a script's globals are the defaults; a config file, then `--key=value` or `--key value`,
change them, in order.

    python train.py config/remove_ln_tiny.py config/control.py --seed=2 --dtype float32

A config file is Python whose assignments are settings, but for names that begin with `_`. It may read
what was set before it (`out_dir = out_dir + "_control"`).

A setting is one line: its default, and a comment that says what it means. Where the comment begins
with a bound, the bound is checked:

    batch_size = 16  # >= 1: sequences in a micro-batch
    dropout = 0.0  # >= 0 and < 1: share of activations
    dtype = "auto"  # auto, float32 or bfloat16: of autocast
"""
import ast
import difflib
import math
import os
import re
import sys

from parts.errors import UserError


def configure(settings, argv, doc):
    """Apply argv to the dict `settings` (a script's globals()) in place, check it, and return the
    settings alone. UserError on a file, a key or a value that it can't take; `--help` prints doc
    and the settings."""
    kinds = (bool, int, float, str, list)
    names = [k for k, v in settings.items() if k[0].islower() and isinstance(v, kinds)]  # not _x, nor X
    comments = read_comments(settings.get("__file__"))
    argv = list(argv)
    if "--help" in argv or "-h" in argv:
        print(doc.strip(), "\n\nsettings:")
        for name in names:
            print(f"  --{name}={settings[name]!r}".ljust(36), comments.get(name, ""))
        sys.exit()
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            apply_file(settings, names, arg)
            continue
        key, equals, value = arg[2:].partition("=")
        check_name(names, key, f"--{key}")
        if not equals and settings[key] is False and (not argv or argv[0] not in ("True", "False", "true", "false")):
            value = "True"  # --force alone
        elif not equals:
            if not argv:
                raise UserError(f"--{key} needs a value, as in --{key}={settings[key]!r}")
            value = argv.pop(0)
        settings[key] = check_type(f"--{key}", parse(value, settings[key]), settings[key])
    for name in names:
        check_bound(name, settings[name], comments.get(name, ""))
    return {name: settings[name] for name in names}


def take_source(usage):
    """The first argument of a script that needs one beside its settings; it is taken out of sys.argv."""
    if len(sys.argv) > 1 and sys.argv[1] in ("--help", "-h"):
        return ""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError(f"usage: {usage}")
    return sys.argv.pop(1).rstrip("/")


def apply_file(settings, names, path):
    if not os.path.isfile(path):
        raise UserError(f"no config file {path}; settings are given as --key=value")
    before = {name: settings[name] for name in names}
    after = dict(before)
    try:
        with open(path) as f:
            exec(compile(f.read(), path, "exec"), after)
    except Exception as e:
        raise UserError(f"{path} is not a config file: {type(e).__name__}: {e}") from None
    for key, value in after.items():
        if key.startswith("_"):
            continue
        check_name(names, key, f"{key} in {path}")
        settings[key] = check_type(f"{key} in {path}", value, before[key])


def check_name(names, key, where):
    if key not in names:
        near = difflib.get_close_matches(key, names, 1, 0.5)
        raise UserError(f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))


def parse(text, default):
    """The text of a flag as a value of the default's type; as it stands where it is none, for
    check_type to refuse."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def check_type(where, value, default):
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(default) is list and type(value) is tuple:
        value = list(value)
    if type(value) is not type(default):
        raise UserError(f"{where} must be {type(default).__name__}, as {default!r} is, but it is {value!r}")
    if type(value) is str and value != value.encode(errors="replace").decode():
        raise UserError(f"{where} is not UTF-8 text: {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, but it is {value!r}")
    return value


def read_comments(path):
    """{setting: the comment behind its default} of a script."""
    if path is None:
        return {}
    with open(path, encoding="utf-8") as f:
        return dict(re.findall(r"^(\w+) = .*?  # (.*)$", f.read(), re.MULTILINE))


def check_bound(name, value, comment):
    """UserError unless the value keeps to the bound that its comment begins with."""
    bound, colon, _ = comment.partition(": ")
    number = re.fullmatch(r">= (\S+)(?: and (<=?) (\S+))?", bound)
    if number and colon:
        low, below, high = number.groups()
        low, high = eval(low), eval(high or "None")  # of our own source, as 2**63
        if value < low or (below == "<" and value >= high) or (below == "<=" and value > high):
            also = {None: "", "<": f", and below {high}", "<=": f", and at most {high}"}[below]
            raise UserError(f"{name} is {value}, but it must be {low} or more{also}")
    choices = re.fullmatch(r"(?:\w+, )*\w+ or \w+", bound)
    if choices and colon and value not in re.split(r", | or ", bound):
        raise UserError(f"{name} is {value!r}, but it must be {bound}")
