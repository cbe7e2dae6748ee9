"""
The device, a CUDA GPU where there is one, computes what the CPU computes in float64 and what transformers computes.
`pytest -m device` runs these alone, and so does dev/gpu.sh.
"""
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, SCHEDULE, SHORT, TINY, read_log, run_alone, set_all_fake
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from model import GPT
from parts.compare import measure
from parts.data import read_windows
from parts.device import autocast_to
from parts.loss import LossInPieces
from tools.sample import generate

pytestmark = pytest.mark.device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def tiny():
    return GPT.from_pretrained(TINY).eval().to(DEVICE)


@pytest.fixture
def exact():
    """transformers' own, in float64 on the CPU."""
    return GPT2LMHeadModel.from_pretrained(TINY).double().eval()


@pytest.fixture
def idx():
    return torch.randint(0, 257, (2, 100))


def test_logits(tiny, exact, idx):
    expected = exact(idx).logits
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        with autocast_to(dtype, DEVICE):
            logits = tiny(idx.to(DEVICE))[0].double().cpu()
        assert (logits - expected).abs().max() < bound, dtype


def test_gradient_of_the_loss_in_pieces(tiny, exact, idx, monkeypatch):
    def cross_entropy(logits, targets, _):
        return F.cross_entropy(logits, targets, reduction="sum"), {}

    monkeypatch.setattr("parts.loss.LOSS_ROWS", 9)
    monkeypatch.setattr("parts.loss.GPU_FACTOR", 1)
    targets = torch.randint(0, 257, idx.shape)
    F.cross_entropy(exact(idx).logits.flatten(0, 1), targets.flatten()).backward()
    _, hidden = tiny(idx.to(DEVICE), streams=True)
    LossInPieces(cross_entropy, tiny.lm_head)(hidden, targets.to(DEVICE))[0].backward()
    expected = exact.transformer.wte.weight.grad
    assert (tiny.transformer.wte.weight.grad.double().cpu() - expected).norm() < 1e-4 * expected.norm()


def test_folded_is_the_same_function(tiny, idx):
    tiny.measure_std(idx.to(DEVICE))
    set_all_fake(tiny)
    with torch.no_grad():
        torch.testing.assert_close(tiny.fold()(idx.to(DEVICE))[0], tiny(idx.to(DEVICE))[0], atol=1e-4, rtol=1e-4)


def test_std_that_is_measured(tiny, exact, idx):
    idx[idx == 256] = 0
    tiny.measure_std(idx.to(DEVICE))
    with torch.no_grad():
        x = exact(idx, output_hidden_states=True).hidden_states[1]  # what the second block reads
    std = (x.var(-1, unbiased=False) + 1e-5).sqrt()
    site = tiny.sites()["h.1.ln_1v"]
    assert site.avg_std.item() == pytest.approx(std[:, 1:].mean().item(), rel=1e-5)
    assert site.bos_std.item() == pytest.approx(std[:, 0].mean().item(), rel=1e-5)


def test_windows_losses_and_decoding(tiny, exact):
    tokens = np.arange(1000, dtype="<u2") % 257
    starts = [0, 500]
    x, y = read_windows(tokens, starts, 64, DEVICE)
    assert (x[1, 0].item(), y[1, -1].item()) == (500 - 257, 564 - 2 * 257)
    found = measure({"tiny": tiny}, None, tokens, starts, 64, 2, DEVICE, autocast_to(torch.float32, DEVICE))
    with torch.no_grad():
        logits = exact(x.cpu()).logits
        expected = F.cross_entropy(logits.flatten(0, 1), y.cpu().flatten(), reduction="none")
        likeliest = logits[0, -1].argmax().item()
    np.testing.assert_allclose(np.ravel(found["tiny"]["loss"]), expected, atol=1e-4)
    assert list(generate(tiny, x[0].tolist(), 1, 0, 0, None)) == [likeliest]


EXACT = ["--dtype=float32", f"--ln_schedule={SCHEDULE}"]  # flags for train.py


@pytest.mark.slow
@pytest.mark.parametrize("flags, launcher, close", [
    (["--compile=True"], [], 1e-3),
    (["--dtype=bfloat16"], [], 0.03),
    ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], 1e-4),
])
def test_compiled_bfloat16_and_data_parallel_losses(stdlib, flags, launcher, close):
    """Through all events of a removal, beside eager float32 in one process. Two processes need two GPUs, or none."""
    if launcher and torch.cuda.device_count() == 1:
        pytest.skip("one GPU")
    plain = run_alone("train.py", *SHORT, *EXACT, "--out_dir=out/plain")
    other = run_alone("train.py", *SHORT, *EXACT, *flags, "--out_dir=out/other", launcher=launcher)
    assert (plain.code, other.code) == (0, 0), plain.text + other.text
    assert read_log("out/other", "loss") == pytest.approx(read_log("out/plain", "loss"), rel=close)


@pytest.mark.slow
def test_a_stopped_run_continues(run, stdlib, at_step):
    """To the bit on a CPU. GPU kernels add in no fixed order."""
    command = ["train.py", *SHORT, *EXACT]
    assert run(*command, "--out_dir=out/whole").code == 0
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*command, "--out_dir=out/stopped").code == 128 + signal.SIGTERM
    assert run(*command, "--out_dir=out/stopped", "--init_from=resume").code == 0
    losses = read_log("out/whole", "loss")
    assert read_log("out/stopped", "loss") == (losses if DEVICE == "cpu" else pytest.approx(losses, rel=1e-3))


def test_memory_that_is_freed_is_reused():
    """By default glibc returns a block of more than 32 MB at once, and fetches the next one page by page."""
    code = """
import resource, torch
from parts.device import keep_memory
KEEP
faults = []
for step in range(40):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[39] - faults[19])
"""
    kept, plain = (int(subprocess.check_output([sys.executable, "-c", code.replace("KEEP", call)], cwd=REPO))
                   for call in ("keep_memory()", ""))
    assert kept < 0.1 * plain
