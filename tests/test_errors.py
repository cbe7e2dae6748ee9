"""
A user's mistake is one line and exit code 1. A mistake in the code keeps its traceback: mistakes are planted in a copy
of the code, whose scripts run in processes of their own.
"""
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import REPO, SHORT, run_alone, write_dataset

from parts.errors import UserError, reading, show

BUG = "a, b = (1, 2, 3)"  # ValueError: a UserError is one too
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the code in copy/, and data/mine."""
    monkeypatch.chdir(tmp_path)
    write_dataset()
    for path in [*Path(REPO).glob("*.py"), *(p for d in ("parts", "tools") for p in Path(REPO, d).glob("*.py"))]:
        new = tmp_path / "copy" / path.relative_to(REPO)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    return tmp_path / "copy"


def plant(path, bug, landmark):
    """Write a line of code below the line with the landmark."""
    text = path.read_text()
    at = text.index("\n", text.index(landmark)) + 1
    indent = re.match(" *", text[at:])[0]
    path.write_text(f"{text[:at]}{indent}{bug}\n{text[at:]}")


TRAIN = ["train.py", *SHORT, "--dataset=mine"]
PREPARE = ["prepare_owt.py", "--dataset=other", "--files=a.txt"]
IN_THE_MODEL = ("model.py", BUG, "self.folded = config.folded")


@pytest.mark.parametrize("command, launcher, file, bug, landmark", [
    (TRAIN, (), *IN_THE_MODEL),
    (PREPARE, (), "prepare_owt.py", BUG, "def encode_job("),
    pytest.param(TRAIN, (), "train.py", 'open("trian.bin")', "for step in range(start", marks=pytest.mark.slow),
    pytest.param(TRAIN, TORCHRUN, *IN_THE_MODEL, marks=pytest.mark.slow),
])
def test_a_mistake_in_the_code_keeps_its_traceback(copy, tmp_path, command, launcher, file, bug, landmark):
    """In the model, in a worker of the preparation, a file that the code itself misses, under torchrun: it ends in the
    error's own traceback, with the bug's line in it."""
    (tmp_path / "a.txt").write_text("a" * 100)
    plant(copy / file, bug, landmark)
    done = run_alone(copy / command[0], *command[1:], launcher=launcher, env={"OMP_NUM_THREADS": "1"})
    assert done.code == 1
    assert f'File "{copy / file}", line ' in done.text
    assert bug in done.text
    assert ("FileNotFoundError: [Errno 2]" if "open" in bug else "ValueError: too many values to unpack") in done.text
    assert not re.search("^error:", done.text, re.MULTILINE)


def test_a_users_mistake_is_one_line_in_a_process_of_its_own(tmp_path):
    done = run_alone("train.py", "--max_itrs=3", cwd=tmp_path)
    assert done.error == done.text.strip()
    assert "--max_itrs" in done.error


@pytest.mark.parametrize("error", [KeyError("eot"), ValueError("two\nlines"), RecursionError("deep"), EOFError()])
def test_whatever_goes_wrong_in_reading_is_one_line_with_the_path(error):
    with pytest.raises(UserError, match=rf"data/meta.json: {type(error).__name__}.*; prepare it again\Z") as caught:
        with reading("data/meta.json", "prepare it again"):
            raise error
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_pipe_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.*No such file"):
        with reading("nowhere"):
            open("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe"):
        with reading(str(tmp_path / "pipe")):
            raise AssertionError("it would hang")


def test_a_switch_shows_the_traceback_of_what_went_wrong_in_reading(monkeypatch):
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        with reading("file"):
            1 / 0


@pytest.mark.parametrize("message", [
    "[enforce fail at alloc_cpu.cpp:132] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "CUDA out of memory. Tried to allocate 20.00 GiB.",
])
def test_a_batch_that_does_not_fit_is_one_line(capsys, message):
    error = RuntimeError(message)
    show(type(error), error, None)
    assert "batch_size" in capsys.readouterr().err
