"""
Two kinds of error. What a user did wrong is one line and exit code 1; everything else is a mistake in the
code, and keeps its traceback.

Mistakes are planted in a copy of the code, whose scripts run in processes of their own.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import REPO, SHORT, TINY, run_alone
from pyarrow import parquet

BUG = "a, b = (1, 2, 3)"  # ValueError: a user's mistake is one too
OWN_OSERROR = 'open("data/mine/trian.bin")'
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the code, in copy/ of the test's own folder."""
    monkeypatch.chdir(tmp_path)
    for path in [*Path(REPO).glob("*.py"), *Path(REPO).glob("parts/*.py"), *Path(REPO).glob("config/*.py")]:
        new = tmp_path / "copy" / path.relative_to(REPO)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    return tmp_path / "copy"


@pytest.fixture
def dataset(tmp_path):
    """data/mine: 1,000 tokens of vocabulary 257 a split."""
    (tmp_path / "data/mine").mkdir(parents=True)
    for split in ("train", "val"):
        (np.arange(1000) % 250).astype("<u2").tofile(tmp_path / f"data/mine/{split}.bin")
    meta = dict(vocab_size=257, eot=256, tokenizer="bytes", train=dict(tokens=1000), val=dict(tokens=1000))
    (tmp_path / "data/mine/meta.json").write_text(json.dumps(meta))


def plant(path, bug, *landmarks):
    """Write a line of code into a file: below the line with the last of the landmarks, each of which is
    sought after the one before it."""
    text = path.read_text()
    at = 0
    for landmark in landmarks:
        at = text.index(landmark, at)
    at = text.index("\n", at) + 1
    indent = re.match(" *", text[at:])[0]
    path.write_text(f"{text[:at]}{indent}{bug}\n{text[at:]}")


def assert_traceback(done, path, bug, error):
    """It ends in the error's own traceback, with the bug's line in it."""
    assert done.code == 1
    assert "Traceback (most recent call last):" in done.text
    assert f'File "{path}", line ' in done.text
    assert bug in done.text
    assert done.text.splitlines()[-1].startswith(error)
    assert not re.search("^error:", done.text, re.MULTILINE)


# --- a mistake in the code


@pytest.mark.parametrize("script, args", [
    ("train.py", [*SHORT, "--max_iters=1", "--dataset=mine"]),
    ("eval.py", [f"--models={TINY}"]),
    ("sample.py", [TINY]),
    ("export.py", [TINY, "--out=exported"]),
])
def test_a_mistake_in_the_model_keeps_its_traceback(copy, dataset, script, args):
    plant(copy / "model.py", BUG, "class Block(", "def __init__(")
    done = run_alone(copy / script, *args, env=ONE_THREAD)
    assert_traceback(done, copy / "model.py", BUG, "ValueError: too many values to unpack")


@pytest.mark.parametrize("documents, file, function", [
    ("a.txt", "parts/sources.py", "def read_text("),
    ("a.parquet", "parts/sources.py", "def read_rows("),
    ("a.txt", "prepare_owt.py", "def encode_batch("),  # in a worker
])
def test_a_mistake_in_the_preparation_keeps_its_traceback(copy, tmp_path, documents, file, function):
    (tmp_path / "a.txt").write_text("a" * 100)
    parquet.write_table(pyarrow.table({"text": ["a" * 100]}), tmp_path / "a.parquet")
    plant(copy / file, BUG, function)
    args = ["--dataset=mine", f"--files={documents}"]
    done = run_alone(copy / "prepare_owt.py", *args, env=ONE_THREAD)
    assert_traceback(done, copy / file, BUG, "ValueError: too many values to unpack")


def test_a_file_that_the_code_itself_misses_keeps_its_traceback(copy, dataset):
    plant(copy / "train.py", OWN_OSERROR, "for step in range(start, max_iters + 1):")
    done = run_alone(copy / "train.py", *SHORT, "--max_iters=1", "--dataset=mine", env=ONE_THREAD)
    assert_traceback(done, copy / "train.py", OWN_OSERROR, "FileNotFoundError: [Errno 2]")


def test_a_file_that_a_worker_of_the_preparation_misses_keeps_its_traceback(copy, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    plant(copy / "prepare_owt.py", OWN_OSERROR, "def encode_batch(")
    done = run_alone(copy / "prepare_owt.py", "--dataset=mine", "--files=a.txt", env=ONE_THREAD)
    assert_traceback(done, copy / "prepare_owt.py", OWN_OSERROR, "FileNotFoundError: [Errno 2]")


def test_a_mistake_under_torchrun_keeps_its_traceback(copy, dataset):
    plant(copy / "model.py", BUG, "class Block(", "def __init__(")
    done = run_alone(copy / "train.py", *SHORT, "--dataset=mine", launcher=TORCHRUN, env=ONE_THREAD)
    assert done.code == 1
    assert f'File "{copy}/model.py", line ' in done.text
    assert BUG in done.text
    assert "ValueError: too many values to unpack" in done.text
    assert not re.search("^error:", done.text, re.MULTILINE)


# --- a mistake of the user's


@pytest.mark.parametrize("script, args, message", [
    ("train.py", ["--max_itrs=3"], "unknown setting --max_itrs; did you mean max_iters?"),
    ("sample.py", [], "usage: python -m tools.sample"),
    ("plot.py", ["none"], "none/log.jsonl is not there"),
    # in a worker
    ("prepare_owt.py", ["--dataset=mine", "--files=a.txt", "--tokenizer=9:8"], "a.txt holds text"),
])
def test_a_mistake_of_the_users_is_one_line(tmp_path, script, args, message):
    (tmp_path / "a.txt").write_text("a" * 100)
    command = [sys.executable, Path(REPO, script), *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: " + message)
    assert done.stderr.count("\n") == 1


def test_a_mistake_of_the_users_under_torchrun_is_said_once(tmp_path):
    done = run_alone("train.py", "--max_itrs=3", launcher=TORCHRUN, env=ONE_THREAD, cwd=tmp_path)
    assert done.code == 1
    assert "\nerror: unknown setting --max_itrs; did you mean max_iters?\n" in "\n" + done.text
    assert done.text.partition("torch/distributed/elastic")[0].count("did you mean max_iters?") == 1


# --- help


IMPORTED = ("configurator.py", "model.py", "schedule.py")  # not to be run
SCRIPTS = sorted(path.name for path in Path(REPO).glob("*.py") if path.name not in IMPORTED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_each_setting_of_a_script_means(run, script):
    done = run(script, "--help")
    assert done.code == 0
    assert f"python {script}" in done.text
    text = Path(REPO, script).read_text()
    settings = re.split("^# -+$", text, flags=re.MULTILINE)[1:2]  # between two rulers; plot.py has none
    assert bool(settings) == (script != "plot.py")
    defined = re.findall(r"^(\w+) = (.*)$", "".join(settings), re.MULTILINE)
    printed = [line for line in done.text.splitlines() if line.startswith("  --")]
    assert len(printed) == len(defined)
    for line, (name, rest) in zip(printed, defined):
        _, _, comment = rest.partition("  # ")
        assert comment, name
        assert line.startswith(f"  --{name}=")
        assert line.endswith(" " + comment)
