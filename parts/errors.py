"""
Two kinds of error. What a user did wrong is a UserError: it is raised where it is found, and ends
the script with its one line and exit code 1. Everything else is a mistake in the code, and keeps
its traceback.
"""
import os
import sys
import time
from contextlib import contextmanager


class UserError(ValueError):
    """What a user did wrong, in one line: what it is, where, and what to do."""


def show_user_errors_in_one_line():
    """For a script, before it does anything else."""
    sys.excepthook = show


def show(kind, error, traceback):
    if not issubclass(kind, UserError):
        return sys.__excepthook__(kind, error, traceback)
    if os.environ.get("RANK", "0") != "0":
        # all processes find the same mistake: rank 0 says it, and torchrun ends the others before they do
        time.sleep(3)
    print(f"error: {error}", file=sys.stderr)


@contextmanager
def on_disk(what):
    """Around reading or writing a file: a full disk, a missing permission and the like are the
    user's, not the code's. `what` begins the line: "can't write out/run/log.jsonl"."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or e}") from None
