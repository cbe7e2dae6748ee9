"""
Two kinds of errors. A user's mistake is a UserError: it ends the script with one line and exit code 1. Anything else
is a mistake in the code and keeps its traceback.
"""
import json
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager

# what a user, a scheduler or a closed terminal ends a process with; Windows has only two of them
ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class UserError(ValueError):
    """A user's mistake in one line: what is wrong, where, and what to do."""

    def __init__(self, line):
        super().__init__(" ".join(line.splitlines()))


def first_line(error):
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]


# --- around files and servers


@contextmanager
def reading(path, advice=""):
    """Whatever goes wrong while path is read becomes one line: the path, the error, the advice. TRACEBACK=1 in the
    environment shows where it went wrong. Pipes and devices are refused, because reading them may never end."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"{path} is not a file")
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:
        if os.environ.get("TRACEBACK"):
            raise
        problem = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
        raise UserError(f"can't read {path}: {problem}" + (f"; {advice}" if advice else "")) from None


@contextmanager
def on_disk(what):
    """A full disk or a missing permission is one line that begins with `what`: "can't write out/run/log.jsonl"."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or e}") from None


@contextmanager
def asking_hub(what, advice=""):
    """Whatever goes wrong is one line that begins with `what`, such as "gpt2 can't be fetched from", and ends with the
    advice: huggingface_hub raises many kinds."""
    from huggingface_hub import constants  # only here: local files do without

    try:
        yield
    except Exception as e:
        problem = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise UserError(f"{what} {constants.ENDPOINT} ({problem}){advice and '; '}{advice}") from None


# --- how a script begins and ends


def begin_script():
    """Call this before the slow imports. A user's mistake becomes one line; Ctrl-C ends the script at once, unless it
    has work to save; characters that a terminal lacks, such as ± in ASCII, become ?."""
    sys.excepthook = show
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a line that can't be written fails where it is printed
            getattr(sys, name).reconfigure(errors="replace", line_buffering=True)


def command(script, *args):
    """A command line that runs a script of ours, such as train.py or tools.lens, from the folder that we are in."""
    here = "" if os.path.realpath(os.curdir) == os.path.realpath(REPO) else REPO
    args = [os.path.join(here, arg) if arg.startswith("config/") else arg for arg in args]
    if script.endswith(".py"):
        return shlex.join(["python", os.path.join(here, script), *args])
    return f"PYTHONPATH={shlex.quote(here)} " * bool(here) + shlex.join(["python", "-m", script, *args])


def say_next(*commands):
    """Print what to type next, but not under make, which runs it itself."""
    if commands and "MAKELEVEL" not in os.environ:
        print("next: " + "; ".join(commands))


def show(kind, error, traceback):
    if issubclass(kind, OSError):
        try:
            os.write(1, b"\n")
        except BrokenPipeError:  # a reader of our output that has enough, such as `head`, is not an error
            os._exit(128 + signal.SIGPIPE)
        except OSError as e:  # a full disk is one
            print(f"error: can't write the output: {e.strerror}", file=sys.stderr)
            os._exit(1)
    text = str(error)
    if issubclass(kind, UserError):
        line = text
    elif "Connection closed by peer" in text or "Connection reset by peer" in text:  # gloo's
        line = "another process of this run is gone: see what it said, and continue with --init_from=resume"
    elif "out of memory" in text or "can't allocate memory" in text:  # torch's, of a GPU and of a CPU
        line = "out of memory: lower batch_size, or train with --gradient_checkpointing"
    else:
        return sys.__excepthook__(kind, error, traceback)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # every rank finds the same mistake: rank 0 prints it, and torchrun ends the others
    print(f"error: {line}", file=sys.stderr)
    tell_torchrun(f"error: {line}")


def tell_torchrun(line):
    """Let torchrun print this line last, below its own traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w") as f:
            json.dump(dict(message=line), f)


def handle_endings(handler):
    """Let handler(number, frame) take the signals of ENDINGS, except those that are ignored, as nohup ignores SIGHUP.
    Returns {number: the handler before}."""
    numbers = [getattr(signal, name) for name in ENDINGS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    return {number: signal.signal(number, handler) for number in numbers if before[number] != signal.SIG_IGN}


@contextmanager
def interruptible():
    """Turn the signals of ENDINGS into KeyboardInterrupt, so that unfinished work can be put in order."""
    before = handle_endings(signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
