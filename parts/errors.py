"""
Two kinds of error. What a user did wrong is a UserError: it is raised where it is found, and ends
the script with its one line and exit code 1. Everything else is a mistake in the code, and keeps
its traceback.
"""
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

# what a user, a scheduler or a closed terminal ends a process with; Windows has but two of them
ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
PATIENCE = 20  # seconds


class UserError(ValueError):
    """What a user did wrong, in one line: what it is, where, and what to do."""

    def __init__(self, line):
        super().__init__(" ".join(line.splitlines()))


def begin_script():
    """A script's first act, before its slow imports. From here on a user's mistake is one line; Ctrl-C ends the
    script at once and without a word, but where it has work to save; and what a terminal can't show, as ± in
    ASCII, is a ?."""
    sys.excepthook = show
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # so that a line that can't be written fails where it is printed


def show(kind, error, traceback):
    if issubclass(kind, OSError):
        end_if_stdout_fails()
    if issubclass(kind, UserError):
        line = str(error)
    elif "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):  # gloo's
        line = "another process of this run is gone: see what it said, and go on with --init_from=resume"
    else:
        return sys.__excepthook__(kind, error, traceback)
    if os.environ.get("RANK", "0") != "0":
        # all processes find the same mistake: rank 0 says it, and torchrun ends the others before they do
        time.sleep(3)
    print(f"error: {line}", file=sys.stderr)
    tell_torchrun(f"error: {line}")


def end_if_stdout_fails():
    """What reads our output may have enough of it, as `head`: that is no error. A full disk is one."""
    try:
        os.write(1, b"\n")
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)
    except OSError as e:
        print(f"error: can't write the output: {e.strerror}", file=sys.stderr)
        os._exit(1)


def tell_torchrun(line):
    """What torchrun is to print last, below its own traceback: why this process ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w") as f:
            json.dump(dict(message=line), f)


def handle_endings(handler):
    """Let handler(number, frame) take the signals of ENDINGS, but for those that are ignored, as nohup ignores SIGHUP.
    Returns {number: the handler before}."""
    numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    return {number: signal.signal(number, handler) for number in numbers if before[number] != signal.SIG_IGN}


@contextmanager
def interruptible():
    """Within, the signals of ENDINGS raise KeyboardInterrupt, so that what is begun can be put in order."""
    before = handle_endings(signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def on_disk(what):
    """Around reading or writing a file: a full disk, a missing permission and the like are the
    user's, not the code's. `what` begins the line: "can't write out/run/log.jsonl"."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or e}") from None


def first_line(error):
    """Of an error of many kinds, what it is."""
    return f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


@contextmanager
def waiting_for(server):
    """Around what asks a server: when it takes long, it is said, once."""
    line = f"still waiting for {server}, which may be asked several times; Ctrl-C ends it, and loses nothing"
    timer = threading.Timer(PATIENCE, print, [line], dict(file=sys.stderr))
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
