"""
gpu.py's three parts, at toy sizes on the CPU or whatever device there is, with no more packages than it says it needs.
"""
import os

import pytest
from conftest import read_json, run_alone

# a module that Python reads at its start: what requirements.txt names and gpu.py doesn't need is not there
MISSING = """
import sys
for name in ("datasets", "matplotlib", "requests", "tokenizers", "huggingface_hub", "pytest", "transformers"):
    sys.modules[name] = None
"""
STEPS = dict(
    checks=["machine", "stdlib", "same_numbers", "compiled", "resumed", "data_parallel", "memory", "tests"],
    speed=["step_small", "step_medium", "step_large", "step_xl", "evaluation", "where_time_goes"],
    job=["text", "micro_batch", "pretrained", "removed", "removed_control", "table"],
)


@pytest.fixture
def bare(tmp_path, stdlib_data, monkeypatch):
    """run_alone("dev.gpu", ...) in an empty folder, with few packages; stdlib is prepared."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MISSING)
    (tmp_path / "data").mkdir()
    os.symlink(os.path.join(stdlib_data, "stdlib"), tmp_path / "data" / "stdlib")
    env = {"PYTHONPATH": str(tmp_path / "site"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}

    def run(*args):
        return run_alone("dev.gpu", *args, "--small", cwd=tmp_path, env=env)

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("part", [
    pytest.param("checks", marks=pytest.mark.slow),
    pytest.param("speed", marks=pytest.mark.slow),
    "job",
])
def test_a_part_runs_without_gpu_network_or_other_packages(bare, part):
    done = bare(part)
    assert done.code == 0, done.text
    found = {step: read_json(f"out/gpu_small/{step}.json") for step in STEPS[part]}
    with open("out/gpu_small/report.md") as f:
        report = f.read()
    for step in found.values():
        assert f"| {' | '.join(map(str, step['head']))} |" in report
    for other in STEPS:
        assert (f"{STEPS[other][-1]}: not done" in report) == (other != part)

    if part == "checks":
        compiled = dict(found["compiled"]["rows"])
        assert float(compiled["compiled: largest difference of a loss"]) < 1e-3
        assert compiled["graphs"] == 4
        assert dict(found["resumed"]["rows"])["the same weights to the bit"] == "yes"
        assert float(found["data_parallel"]["rows"][0][1]) < 1e-3
        assert "not run" in found["tests"]["rows"][0][1]
    if part == "job":
        assert dict(found["removed"]["rows"])["steps"] == 60
        assert "LN-free" in found["table"]["head"][1]
        assert "gap to control" in found["table"]["text"]
        assert "no picture" in found["table"]["head"][1]
        size = sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk("out/gpu_small") for name in names)
        assert size < 15e6


def done_before(*steps):
    os.makedirs("out/gpu_small/logs")
    for step in steps:
        with open(f"out/gpu_small/{step}.json", "w") as f:
            f.write('{"head": ["kept"], "rows": [["from before"]]}')


def test_what_is_done_stays_done(bare):
    done_before(*STEPS["speed"][:5])
    done = bare("speed")
    assert done.code == 0, done.text
    assert "evaluation: done before" in done.text
    with open("out/gpu_small/report.md") as f:
        assert f.read().count("| from before |") == 5


def test_a_step_that_fails_is_named_and_is_not_done(bare):
    done_before(*STEPS["checks"][:3])
    os.remove("data/stdlib")
    os.mkdir("data/stdlib")
    with open("data/stdlib/meta.json", "w") as f:
        f.write("{}")
    done = bare("checks")
    assert done.error == "error: compiled: not as it should be, see above and out/gpu_small/logs"
    assert "data/stdlib" in done.text.splitlines()[-2]
    assert not os.path.exists("out/gpu_small/compiled.json")


@pytest.mark.parametrize("args, message", [
    (["checks"], "there is no CUDA GPU: --small tries this script itself, on the CPU"),
    (["everything", "--small"], "everything is no part: it is checks, speed, job"),
    ([], "usage: python -m dev.gpu checks, speed or job, and --small on a CPU"),
])
def test_what_it_refuses(args, message, tmp_path):
    done = run_alone("dev.gpu", *args, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.error == f"error: {message}"
    assert os.listdir(tmp_path) == []
