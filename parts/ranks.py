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

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def join(device):
    """Meet the other processes. Two hours, since rank 0 may fetch weights or prepare data first."""
    if WORLD > 1:
        gpu = torch.device(device) if device.startswith("cuda") else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=2))


def use_all_gpus(device):
    """Where there are several GPUs, and neither torchrun nor a device was asked for: become torchrun, with this script
    and a process for each GPU."""
    n = torch.cuda.device_count()
    if device == "auto" and n > 1 and "RANK" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


@contextmanager
def rank_0_first():
    """Around what fetches or prepares something: rank 0 does it, then the others find it done."""
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
    """What every process does last: gloo can hang at exit when a tensor was the last thing that was
    sent (torch 2.13)."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def say(line):
    """Print a line, on rank 0, above a progress bar if there is one."""
    if RANK == 0:
        tqdm.write(line)


class Interruption:
    """Ctrl-C and SIGTERM: noted, so that a step is finished and saved first. A second one does not
    wait."""

    def __init__(self):
        self.number = 0
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)

    def note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def on_any_rank(self, device):
        """True on all processes if one of them was interrupted: they stop at the same step."""
        return mean(torch.tensor(float(self.number), device=device)).item() > 0

    def exit(self):
        leave()
        sys.exit(128 + (self.number or signal.SIGTERM))
