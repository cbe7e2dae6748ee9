"""
How fast a step could be: the FLOPs that a token takes, and those that the device can do; the bytes that it can read.
"""
import time

import torch

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


def memory_bandwidth(device):
    """Bytes/s that the device reads: a GB in float32 is summed, timed here."""
    a = torch.ones(2**28, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a.sum().item()
        times.append(time.perf_counter() - began)
    return a.nbytes / min(times)


def flops_per_token(model, T):
    """Of sequences of T tokens, forward and backward (PaLM, arXiv 2204.02311, appendix B): 6 per weight that
    multiplies, and attention's 12 L C T. Neither a teacher's forward pass nor recomputed activations count."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * c.n_layer * c.n_embd * T
