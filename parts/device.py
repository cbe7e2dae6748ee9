"""
Which device and precision a script computes with.
"""
import ctypes
import os
import platform
import re
import shutil
import time
from contextlib import nullcontext

import torch

from parts.errors import UserError
from parts.ranks import LOCAL_RANK


def pick_device(name):
    """`auto` (cuda, mps or cpu, the first that is there) or a device's name -> its name, of this
    process's own GPU. UserError if it is not on this machine."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not re.fullmatch(r"\w+(:\d+)?", name) or not there.get(name.split(":")[0]):
        raise UserError(f"device {name!r} is not on this machine: try --device=cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


def pick_dtype(name, device):
    """`auto`, float32 or bfloat16 -> torch's: by default bfloat16 where the device computes with
    it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if has_bf16 else torch.float32


def keep_memory():
    """From now on, this process keeps on the CPU what it frees, and so reuses it: a step of training allocates a GB,
    and glibc would fetch most of it anew from the system, page by page. No other libc has these settings."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped, and unmapped, on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and nothing below 2 GB goes back


def all_finite(model):
    """Whether each weight of a model, and each constant of its sites, is a finite number."""
    constants = [std for site in model.sites().values() for std in (site.avg_std, site.bos_std)]
    return torch.stack([t.detach().isfinite().all() for t in (*model.parameters(), *constants)]).all().item()


def autocast_to(dtype, device):
    """Around a forward pass: its matrix products in this dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def check_compiler():
    """UserError if torch.compile would find no compiler, long after the start."""
    # what inductor and Triton look for; cl is Windows's
    wanted = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cl")
    if not any(name and shutil.which(name) for name in wanted):
        raise UserError("compile needs a C++ compiler, and there is none here: install g++ (on Windows MSVC), "
                        "or run with --compile=False")


# --- how fast a step could be


PEAK_FLOPS = {  # dense bf16, the makers' data sheets
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "4090": 165e12,
}


def peak_flops(device, dtype):
    """FLOP/s of one device: the data sheet's for a known GPU in bfloat16, else a 2048 x 2048 matrix
    product's, timed here; a 256 x 256 one's where that takes long, as bfloat16 on a CPU that doesn't have it."""
    if device.startswith("cuda") and dtype == torch.bfloat16:
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        for name, peak in PEAK_FLOPS.items():
            if name in words:
                return peak
    for n in (256, 2048):
        a = torch.full((n, n), 0.5, device=device, dtype=dtype)  # draws nothing from the random state
        times = []
        for _ in range(5):
            began = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for the device
            times.append(time.perf_counter() - began)
        if min(times) > 0.02:
            break
    return 2 * n**3 / min(times)


def flops_per_token(model, T):
    """Of sequences of T tokens, forward and backward (PaLM, arXiv 2204.02311, appendix B): 6 per weight that
    multiplies, and attention's 12 L C T. Neither a teacher's forward pass nor recomputed activations count."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * c.n_layer * c.n_embd * T
