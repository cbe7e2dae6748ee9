"""
The processes of a run: one, or those of torchrun. Rank 0 writes and prints.
"""
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from parts.errors import UserError, handle_endings, tell_torchrun


try:
    RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
    range(WORLD).index(RANK)
except ValueError:
    raise UserError("RANK and WORLD_SIZE in the environment are not as torchrun sets them: unset both") from None
PARENT = os.getppid()  # torchrun, where there are several


def join(device):
    """Meet the other processes. Two hours, since rank 0 may fetch weights or prepare data first."""
    if WORLD > 1:
        gpu = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=2))


def use_all_gpus(device):
    """With several GPUs, no torchrun and no device asked for: become torchrun, with a process for each GPU."""
    n = torch.cuda.device_count()
    if device == "auto" and n > 1 and "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


@contextmanager
def rank_0_first():
    """Around code that fetches or prepares something: rank 0 runs it first, then the others find it done."""
    if WORLD > 1 and RANK > 0:
        dist.barrier()
    yield
    if WORLD > 1 and RANK == 0:
        dist.barrier()


def mean(t):
    """The tensor t, averaged over processes in place."""
    if WORLD > 1:
        dist.all_reduce(t)
        t /= WORLD
    return t


def gather(value):
    """A value from each process -> the list of all of them, on each."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def gather_rows(array):
    """Rows RANK, RANK + WORLD, ... of an array, one from each process -> the whole array on each."""
    parts = gather(array)
    whole = np.empty((sum(map(len, parts)), *array.shape[1:]), array.dtype)
    for rank, part in enumerate(parts):
        whole[rank::WORLD] = part
    return whole


def leave():
    """Every process calls this last: gloo can hang at exit if a tensor was the last thing sent (torch 2.13)."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def say(line):
    """Print a line on rank 0, above a progress bar if there is one. If that fails, as after `| head` or on a full disk,
    end the run as SIGTERM does: it saves first, if it has begun."""
    if RANK > 0:
        return
    try:
        tqdm.write(line)
    except OSError:
        silence(1)
        os.kill(os.getpid(), signal.SIGTERM)


def silence(fd):
    """From now on, discard what is written to file descriptor 1, stdout, or 2, stderr."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


class Interruption:
    """Notes a signal that asks the run to end, or torchrun's own end, so that the step is finished and saved first. The
    third signal of a kind ends the run at once; the second may be a Ctrl-C that torchrun passes on."""

    def __init__(self):
        self.number = 0
        self.times = 0
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        handle_endings(self.note)

    def note(self, number, frame):
        self.times = self.times + 1 if number == self.number else 1
        self.number = number
        if self.times == 3 and number in (signal.SIGINT, signal.SIGTERM):  # SIGXCPU comes each second
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if number == getattr(signal, "SIGHUP", None):  # the terminal is gone
            for fd in self.terminals:
                silence(fd)

    def on_any_rank(self, device):
        """True on all processes if one of them was interrupted: they stop at the same step."""
        if WORLD > 1 and os.getppid() != PARENT:
            self.number = signal.SIGTERM  # torchrun was killed: nobody else would end this process
        return mean(torch.tensor(float(self.number), device=device)).item() > 0

    def exit(self, line):
        """Exit with 128 + the signal's number, as shells do, and a last line."""
        say(line)
        tell_torchrun(line)
        leave()
        sys.exit(128 + (self.number or signal.SIGTERM))
