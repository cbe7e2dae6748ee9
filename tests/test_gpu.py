"""
dev/gpu.sh and dev/bench.py at toy sizes, on the CPU or whatever device there is.
"""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

from dev import bench

@pytest.mark.slow
@pytest.mark.parametrize("part, expected", [
    ("speed", ["bfloat16, not compiled", "to transformers, torch.bfloat16"]),
    ("job", ["gap to control", "LN-free: all"]),
])
def test_a_part_of_the_report(part, expected, tmp_path):
    code = shutil.copytree(REPO, tmp_path / "code", ignore=shutil.ignore_patterns(".*", "out", "data"))
    env = os.environ | dict(SMALL="1", PYTHON=sys.executable)
    done = subprocess.run([code / "dev/gpu.sh", part], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    report = (code / f"out/gpu/{part}.txt").read_text()
    assert report.partition("\n")[2] in done.stdout  # without the machine's name
    for words in expected:
        assert words in report


@pytest.fixture
def toy(monkeypatch):
    sizes = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=300, batch_size=2, steps=1, rounds=1, block_size=16)
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)


def test_both_sides_of_a_comparison_compute_the_same(toy):
    """bench.py asserts it."""
    bench.compare_eval()
    bench.compare_sample(n=16)


def test_all_ways_of_training_have_the_same_loss(toy):
    losses = {name: bench.measure_step(**(way | dict(compiled=False)))["loss"] for name, way in bench.WAYS.items()}
    expected = losses.pop("nanoGPT's way, float32")
    # the teacher is the model itself: no KL, and half of the cross-entropy
    assert losses.pop("bfloat16, with a teacher") == pytest.approx(expected / 2, rel=1e-2)
    assert losses.pop("float32") == pytest.approx(expected, rel=1e-6)
    assert list(losses.values()) == pytest.approx([expected] * len(losses), rel=1e-2)
