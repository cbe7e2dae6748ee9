"""
Settings: a script's globals are the defaults. Config files (train.py only), then `--key=value` or `--key value`,
change them, in order.

    python train.py config/remove_ln_tiny.py config/control.py --seed=2 --dtype float32

A config file is Python code and is executed. Its assignments are settings, except names that begin with `_`. It may
use what was set before it (`out_dir = out_dir + "_control"`).
"""
import ast
import difflib
import math
import os
import re
import sys
from contextlib import suppress

from parts.errors import UserError, first_line

TEXTS = ("prompt", "of")  # settings in which ~ is no folder


def configure(settings, argv, doc, at_least={}, at_most={}, below={}, choices={}, configs=False):
    """Apply argv to the dict `settings` (a script's globals()) in place, check it, and return the settings alone.

    Numbers must not be negative; at_least, at_most and below are {setting: bound}, and choices {setting: allowed
    values}. configs: whether config files are taken. `--help` prints doc and the settings. UserError on an unknown
    key, a file or a value that can't be taken."""
    kinds = (bool, int, float, str, list)
    names = [k for k, v in settings.items() if k[0].islower() and isinstance(v, kinds)]  # not _x, nor X
    argv, flag_given = list(argv), False
    effects = {}  # {config file: settings that it changed, and that no later one sets}
    if "--help" in argv or "-h" in argv:
        with open(settings["__file__"], encoding="utf-8") as f:  # the comment behind each default
            comments = dict(re.findall(r"^(\w+) = .*?  # (.*)$", f.read(), re.MULTILINE))
        print((doc or "").strip(), "\n\nsettings:")
        for name in names:
            print(f"  --{name}={settings[name]!r}".ljust(36), comments.get(name, ""))
        sys.exit()
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            if not configs or not arg.endswith(".py") or flag_given:
                first = "; config files end in .py and come first" * configs
                raise UserError(f"unexpected argument {arg!r}: give --key=value{first}; quote a pattern as '*.py'")
            effects[arg] = apply_file(settings, names, arg, effects)
            continue
        flag_given = True
        key, equals, value = arg[2:].partition("=")
        check_name(names, key, f"--{key}")
        default = settings[key]
        if not equals and isinstance(default, bool) and [*argv, ""][0].lower() not in ("true", "false"):
            value = "True"  # --force alone
        elif not equals:
            if not argv:
                raise UserError(f"--{key} needs a value, as in --{key}={default!r}")
            value = argv.pop(0)
        if not isinstance(default, str):
            with suppress(ValueError, SyntaxError):  # then it stays a text, which assign refuses
                value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        assign(settings, key, value, default, f"--{key}")
    for name in names:
        value, allowed = settings[name], choices.get(name)
        wanted = ""
        if type(value) in (int, float):
            if value < at_least.get(name, 0):
                wanted = f"at least {at_least.get(name, 0)}"
            elif value > at_most.get(name, math.inf):
                wanted = f"at most {at_most[name]}"
            elif value >= below.get(name, math.inf):
                wanted = f"below {below[name]}"
        elif allowed and value not in allowed:
            wanted = f"one of {', '.join(map(str, allowed))}"
        if wanted:
            raise UserError(f"{name} is {value!r}, but must be {wanted}")
    return {name: settings[name] for name in names}


def take_source(usage=""):
    """Take the argument before the settings out of sys.argv. If there is none: UserError with the usage, or ""."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if usage and not {"--help", "-h"} & set(sys.argv):
            raise UserError(f"usage: {usage}")
        return ""
    return os.path.expanduser(sys.argv.pop(1)).rstrip("/")


def apply_file(settings, names, path, effects):
    """Execute a config file. Returns the settings that it changes. UserError if it undoes all that an earlier file
    does: control.py before another config, say."""
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path}")
    before = {name: settings[name] for name in names}
    after = dict(before)
    try:
        with open(path) as f:
            exec(compile(f.read(), path, "exec"), after)
    except (Exception, SystemExit) as e:
        raise UserError(f"{path} can't be used: {first_line(e)}") from None
    for key, value in after.items():
        if key.startswith("_") or value is before.get(key):
            continue
        check_name(names, key, f"{key} in {path}")
        assign(settings, key, value, before[key], f"{key} in {path}")
    changes = {name for name in names if settings[name] != before[name]}
    for earlier, left in effects.items():
        if left and left <= changes:
            raise UserError(f"{earlier} has no effect before {path}: name it after")
        left -= changes
    return changes


def assign(settings, key, value, default, where):
    """Set a value of the default's type. UserError if it has another one."""
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(default) is list and type(value) is tuple:
        value = list(value)
    if type(value) is not type(default):
        raise UserError(f"{where} must be {type(default).__name__}, such as {default!r}, but is {value!r}")
    if type(value) is float and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, but is {value!r}")
    if (key, value) == ("init_from", "auto"):  # init_from keeps what a new run starts from
        key, value = "auto", True
    if isinstance(value, str) and key not in TEXTS:  # a shell leaves the ~ of --key=~/x as it is
        value = ",".join(map(os.path.expanduser, value.split(",")))
    settings[key] = value


def check_name(names, key, where):
    if key not in names:
        near = difflib.get_close_matches(key, names, 1, 0.5)
        raise UserError(f"unknown setting {where}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
