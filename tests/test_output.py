"""
What a person sees: a bar that shows loss and speed, what to type next; and that nothing here needs Linux but where it
says so.
"""
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from fcntl import ioctl

import pytest
import torch
from conftest import REPO, SCHEDULE, SHORT, TINY, read_tokens

from parts import ranks


def test_the_bar_shows_loss_and_speed_at_80_columns(run, stdlib):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, f"{REPO}/train.py", *SHORT, "--log_interval=100", "--out_dir=out/bar"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # Linux's end of file, of a terminal
        while more := os.read(ours, 65536):
            text += more
    assert process.wait() == 0, text.decode()
    bars = [part for part in re.split("[\n\r]", text.decode()) if "/12 |" in part and "loss" in part]
    assert len(bars) > 2
    for bar in bars:
        assert len(bar.split("\x1b")[0]) <= 80
        assert bar.rstrip("\x1b[A").rstrip().endswith(" tokens/s")


def from_repo(done):
    """A script's last line, as in the repository's folder."""
    return re.sub(rf"(PYTHONPATH=)?{REPO}[ /](?!assets)", "", done.text.strip().splitlines()[-1])


@pytest.mark.slow
def test_each_command_says_the_next_one(run, stdlib, tmp_path):
    """Followed as printed, from the data to an export."""
    os.symlink(os.path.join(REPO, "config"), tmp_path / "config")
    (tmp_path / "a.txt").write_text("x" * 10_000)
    done = run("prepare_owt.py", "--files=a.txt", f"--dataset={tmp_path.name}")
    following = f"train.py config/remove_ln_mine.py --init_from=path/to/model --dataset={tmp_path.name}"
    assert from_repo(done).endswith(following)

    removal = [*SHORT, f"--ln_schedule={SCHEDULE}", "--out_dir=out/mine"]
    command, trail = ["train.py", *removal], []
    for more in ([], [], ["--tokens=512"], [], ["--prompt=def"]):
        done = run(*command, *more)
        assert done.code == 0, done.text
        trail.append(re.match(r"next: python (?:-m )?(.+?)(; python .*|  \(.*)?$", from_repo(done))[1])
        command = shlex.split(trail[-1])
    assert run(*command).code == 0
    assert os.path.exists("out/mine/hf/README.md")
    assert trail == [
        shlex.join(["train.py", "config/control.py", *removal, "--out_dir=out/mine_control", "--ln_schedule=[]"]),
        "eval.py out/mine --dataset=stdlib",
        "tools.plot out/mine",
        "tools.lens out/mine --prompt=TEXT",
        "tools.export out/mine --to=hf",
    ]


@pytest.mark.parametrize("args, following", [
    (["--init_from=scratch", "--out_dir=out/new"], "train.py config/remove_ln_mine.py --init_from=out/new/model "),
    ([f"--init_from={TINY}", "--out_dir=elsewhere"], f"eval.py --models={TINY},elsewhere --dataset=stdlib"),
])
def test_what_comes_next_depends_on_the_run(run, stdlib, args, following):
    shape = ["--n_layer=1", "--n_head=1", "--n_embd=8"]
    done = run("train.py", *SHORT, *shape, *args, "--max_iters=1")
    assert f"val loss over 4 of {(len(read_tokens('val', 'stdlib')) - 1) // 32:,} windows\n" in done.text
    assert f"next: python {following}" in from_repo(done)


@pytest.mark.parametrize("version, refused", [((3, 10), True), ((3, 11), False), ((3, 14), False), ((3, 15), True)])
def test_an_installation_begins_with_pythons_version(tmp_path, version, refused):
    """A script stands for Python: it answers for that version, and makes no environment."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(os.path.join(REPO, name), tmp_path)
    fake = tmp_path / "python"
    change = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    fake.write_text(f"#!/bin/sh\n[ $1 = -c ] && exec {sys.executable} -c '{change}' \"$2\"\necho venv; exit 1\n")
    fake.chmod(0o755)
    done = subprocess.run(["make", ".venv/installed", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert (f"{fake} is {version[0]}.{version[1]}" in done.stderr) == refused
    assert ("venv\n" in done.stdout) == (not refused)


def test_the_library_of_locks_is_not_needed_to_import():
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import eval, prepare_owt, dev.bench"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("device, rank, started", [
    ("auto", None, True),
    ("cuda", None, False),  # one was asked for
    ("auto", "0", False),  # torchrun's already
])
def test_several_gpus_are_all_used(monkeypatch, device, rank, started):
    commands = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--dataset=pile"])
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    ranks.use_all_gpus(device)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    assert commands == [[*torchrun, "eval.py", "--dataset=pile"]] * started
