"""
dev/gpu.py and dev/bench.py at toy sizes, on the CPU or whatever device there is.
"""
import os
import resource

import pytest
from conftest import run_alone

from dev import bench

TOY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--batch_size=2", "--steps=1", "--rounds=1"]


@pytest.mark.slow
@pytest.mark.parametrize("part, expected", [
    ("speed", ["bfloat16, not compiled", "to transformers, torch.bfloat16"]),
    ("job", ["gap to control", "LN-free"]),
])
def test_a_part_of_the_report(part, expected, tmp_path):
    done = run_alone("dev.gpu", "--small", f"--part={part}", cwd=tmp_path)
    assert done.code == 0, done.text
    report = (tmp_path / "out/gpu/report.md").read_text()
    for words in (f"## {part}", *expected):
        assert words in report


def test_without_a_gpu_nothing_is_run(tmp_path):
    assert "--small" in run_alone("dev.gpu", cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}).error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["eval", "hellaswag", "sample"])
def test_both_sides_of_a_comparison_compute_the_same(run, what):
    """bench.py asserts it."""
    assert run("dev.bench", f"--what={what}", "--block_size=16", *TOY).code == 0


def test_all_ways_of_training_have_the_same_loss(monkeypatch):
    for flag in TOY + ["--block_size=16"]:
        name, value = flag[2:].split("=")
        monkeypatch.setattr(bench, name, int(value))
    losses = {name: bench.measure_step(**(way | dict(compiled=False)))["loss"] for name, way in bench.WAYS.items()}
    expected = losses.pop("nanoGPT's way, float32")
    # the teacher is the model itself: no KL, and half of the cross-entropy
    assert losses.pop("bfloat16, with a teacher") == pytest.approx(expected / 2, rel=1e-2)
    assert losses.pop("float32") == pytest.approx(expected, rel=1e-6)
    for loss in losses.values():
        assert loss == pytest.approx(expected, rel=1e-2)


def test_peak_memory_is_in_bytes_on_linux_and_macos(monkeypatch):
    for system, factor in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(bench.sys, "platform", system)
        expected = factor * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert bench.peak_memory() == pytest.approx(expected, rel=0.01)
