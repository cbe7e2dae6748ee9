"""
Settings: a script's globals are the defaults; a config file, then `--key=value` or `--key value`, change them, in order.

    python train.py config/remove_ln_tiny.py config/control.py --seed=2 --dtype float32

A config file is Python that only assigns, and it may read what was set before it (`out_dir = out_dir + "_control"`).
"""
import ast
import difflib
import math
import os
import sys
import time
from contextlib import contextmanager


@contextmanager
def one_line_errors():
    """Around what touches the user's files: a ValueError or OSError ends the script with its one line, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        stop(e)


def stop(problem):
    """End the script with one line and a non-zero exit; under torchrun, with one line for all processes."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # what all processes meet, rank 0 says, and torchrun ends the others before they repeat it
    sys.exit(f"error: {problem}")


def configure(settings, argv, doc):
    """Apply argv to the dict `settings` (a script's globals()) in place, and return the settings alone. Exits with one line
    on a file, a key or a value that it can't take; `--help` prints doc and the settings."""
    names = [k for k, v in settings.items() if not k.startswith("_") and isinstance(v, (bool, int, float, str, list))]
    argv = list(argv)
    if "--help" in argv or "-h" in argv:
        print(doc.strip(), "\n\nsettings:")
        for name in names:
            print(f"  --{name}={settings[name]!r}")
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
                stop(f"--{key} needs a value, as in --{key}={settings[key]!r}")
            value = argv.pop(0)
        settings[key] = check_type(f"--{key}", parse(value, settings[key]), settings[key])
    return {name: settings[name] for name in names}


def apply_file(settings, names, path):
    if not os.path.isfile(path):
        stop(f"no config file {path}; settings are given as --key=value")
    before = {name: settings[name] for name in names}
    after = dict(before)
    try:
        with open(path) as f:
            exec(compile(f.read(), path, "exec"), {"__builtins__": {}}, after)
    except Exception as e:
        stop(f"{path} is not a config file: {type(e).__name__}: {e}")
    for key, value in after.items():
        check_name(names, key, f"{key} in {path}")
        settings[key] = check_type(f"{key} in {path}", value, before[key])


def check_name(names, key, where):
    if key not in names:
        near = difflib.get_close_matches(key, names, 1, 0.5)
        stop(f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))


def parse(text, default):
    """The text of a flag as a value of the default's type; as it stands where it is none, for check_type to refuse."""
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
        stop(f"{where} must be {type(default).__name__}, as {default!r} is, but it is {value!r}")
    if type(value) is float and not math.isfinite(value):
        stop(f"{where} must be a finite number, but it is {value!r}")
    return value
