"""
The device and precision of a script, and how fast the device could be.
"""
import ctypes
import os
import platform
import re
import shutil
from contextlib import nullcontext

import torch

from parts.errors import UserError
from parts.ranks import LOCAL_RANK


def pick_device(name):
    """`auto` (the first available of cuda, mps and cpu) or a device's name -> the name of this process's device.
    UserError if the machine does not have it."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not re.fullmatch(r"\w+(:\d+)?", name) or not there.get(name.split(":")[0]):
        raise UserError(f"device {name!r} is not on this machine: try --device=cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    if name.startswith("cuda"):
        if int(name[5:]) >= torch.cuda.device_count():
            raise UserError(f"device {name} is not on this machine, which has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(name)
    return name


def pick_dtype(name, device):
    """`auto`, float32 or bfloat16 -> torch's dtype. auto is bfloat16 on hardware that has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if has_bf16 else torch.float32


def keep_memory():
    """Let malloc keep freed memory and reuse it. A training step on a CPU allocates a GB, and by default glibc returns
    most of it to the system and fetches it again page by page. Does nothing with another libc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return memory only beyond 2 GB


def all_finite(model):
    """True if all weights of the model, and all constants of its LayerNorm sites, are finite."""
    constants = [std for site in model.sites().values() for std in (site.avg_std, site.bos_std)]
    return torch.stack([t.detach().isfinite().all() for t in (*model.parameters(), *constants)]).all().item()


def autocast_to(dtype, device):
    """A context for a forward pass, whose matrix products are then in dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def check_compiler():
    """UserError if torch.compile has no C++ compiler, which it would report only after minutes."""
    # the names that inductor and Triton try; cl is for Windows
    wanted = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cl")
    if not any(name and shutil.which(name) for name in wanted):
        raise UserError("compile needs a C++ compiler: install g++ (on Windows MSVC), or pass --compile=False")


# --- how fast it could be


# dense bfloat16, from the data sheets
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12,
              "A10G": 70e12, "4090": 165e12}


def peak_flops(device):
    """FLOP/s of a known GPU in bfloat16; None for any other device."""
    if device.startswith("cuda"):
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        return next((peak for name, peak in PEAK_FLOPS.items() if name in words), None)


def flops_per_token(model, T):
    """FLOPs of forward and backward for a token in sequences of T (PaLM, arXiv 2204.02311, appendix B): 6 for each
    weight that multiplies, and 12 L C T for attention. A teacher and recomputed activations don't count."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * c.n_layer * c.n_embd * T
