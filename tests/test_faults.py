"""
Kills, signals, closed pipes and terminals, damaged files, NaN and inf cost at most the steps since the last checkpoint.
soak.py does the same at length.
"""
import itertools
import math
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest
import soak
import torch
from conftest import REPO, SCHEDULE, SHORT, TINY, read_json, read_log, read_tokens, run_alone, write_dataset
from safetensors.torch import load_file

import schedule
from parts import checkpoint
from parts.files import unfinished

TRAIN = os.path.join(REPO, "train.py")
REMOVAL = ["train.py", *SHORT, f"--ln_schedule={SCHEDULE}"]
MODEL = "out/run/model/model.safetensors"


def saved_step():
    return torch.load("out/run/ckpt.pt", weights_only=True)["step"]


# --- kills


@pytest.mark.slow
@pytest.mark.parametrize("part, n", dict(kills=5, ranks=1, launcher=1, preparations=3).items())
def test_what_is_killed_again_and_again_ends_with_the_same_bits(run, part, n):
    """A removal; one of its two processes, which ends the job; torchrun, whose processes save; a preparation."""
    soak.write_text()
    soak.PARTS[part][0](n, random.Random(1))


# --- the same numbers tomorrow


@pytest.mark.slow
def test_the_demos_first_steps_have_the_losses_that_they_had(run):
    """In float32, on any machine. A wrong schedule, order of the data or learning rate is off by more."""
    soak.write_text()
    assert golden.losses() == pytest.approx(read_json(os.path.join(REPO, "tests/golden.json")), abs=2e-4)  # nats


# --- signals


@pytest.mark.parametrize("name, times", [
    *[(name, 1) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")],
    ("SIGINT", 2),  # at once, as torchrun and a terminal send it
])
def test_what_ends_a_process_saves_within_the_step_and_exits_with_128_and_its_number(run, stdlib, at_step, name, times):
    number = getattr(signal, name)
    at_step(5, lambda: [signal.raise_signal(number) for _ in range(times)])
    done = run(*REMOVAL)
    assert done.code == 128 + number
    assert "out/run/ckpt.pt" in done.text
    assert saved_step() == 6


def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored(run, stdlib, at_step):
    at_step(5, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    done = run(*REMOVAL)
    signal.signal(signal.SIGHUP, before)
    assert done.code == 0


EVAL = [os.path.join(REPO, "eval.py"), f"--models={TINY}", "--dataset=stdlib"]
LONG = dict(
    train=[TRAIN, *SHORT, "--max_iters=1", "--block_size=256", "--batch_size=256"],
    eval=EVAL,
    prepare=[os.path.join(REPO, "prepare_owt.py"), "--dataset=again", "--files=*.txt", "--tokenizer=bytes"],
    sample=["-m", "tools.sample", TINY, "--max_new_tokens=100000"],
)


@pytest.mark.parametrize("script, moment", [
    *[(script, "import") for script in LONG],
    ("train", "first step"),
    *[pytest.param(script, "later", marks=pytest.mark.slow) for script in ("eval", "prepare", "sample")],
])
def test_ctrl_c_before_there_is_anything_to_save_ends_in_one_line_or_none(stdlib, script, moment):
    """train.py says nothing."""
    for i in range(20):
        Path(f"{i}.txt").write_bytes(b"x" * 1_000_000)
    process = soak.start(*LONG[script], stderr=subprocess.PIPE)
    while "_multiarray_umath" not in Path(f"/proc/{process.pid}/maps").read_text():  # numpy, after its first act
        time.sleep(0.01)
    if moment == "first step":
        soak.wait_for(process, "M parameters from")
    elif moment == "later":
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("\n") <= 1, errors
    assert "Traceback" not in errors
    if script == "train":
        assert (process.returncode, errors) == (-signal.SIGINT, "")


# --- where it writes to


def test_a_reader_that_has_enough_of_a_run_ends_it_in_order(stdlib):
    """As `train.py | head`: it saves, and says nothing."""
    process = soak.start(TRAIN, *SHORT, "--max_iters=100000", stderr=subprocess.PIPE)
    assert soak.wait_for(process, "step      5  loss")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 128 + signal.SIGTERM
    assert saved_step() > 5


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_a_run_in_order(stdlib):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.alarm(60)
        os.execv(sys.executable, [sys.executable, TRAIN, *SHORT, "--max_iters=100000", "--eval_interval=10"])
    text = b""
    while b"step     10  val loss" not in text:
        text += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert saved_step() > 5


@pytest.mark.parametrize("command, code", [
    ("EVAL >/dev/full", 1),
    ("EVAL | true; exit ${PIPESTATUS[0]}", 128 + signal.SIGPIPE),
    pytest.param("EVAL >&-", 0, marks=pytest.mark.slow),
    pytest.param("set -o pipefail; PYTHONIOENCODING=ascii EVAL | grep ' ? '", 0, marks=pytest.mark.slow),  # no ±
])
def test_a_table_that_can_not_be_shown_is_in_its_json(stdlib, command, code):
    command = command.replace("EVAL", shlex.join([sys.executable, *EVAL, "--tokens=512", "--json=table.json"]))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 1)
    assert len(read_json("table.json")["rows"]) == 1


@pytest.mark.slow
def test_a_rank_that_is_not_a_number_or_of_no_job_is_one_line(tmp_path):
    for rank in ("abc", "1"):
        assert "RANK" in run_alone("train.py", cwd=tmp_path, env={"RANK": rank}).error


# --- NaN and inf


def spoil_gradients(monkeypatch, steps):
    """The gradients of these steps, counted from 0, are NaN."""
    clip, count = torch.nn.utils.clip_grad_norm_, itertools.count()

    def spoiled(parameters, *rest):
        parameters = list(parameters)
        if next(count) in steps:
            parameters[-1].grad.fill_(math.nan)
        return clip(parameters, *rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)


def test_a_step_whose_gradient_is_nan_is_skipped(run, stdlib, monkeypatch):
    """It changes neither the weights nor the optimizer's means, and the run goes on."""
    spoil_gradients(monkeypatch, {3, 4})
    assert run(*REMOVAL).code == 0
    assert [entry["loss"] is None for entry in read_log() if "loss" in entry] == [k in (3, 4) for k in range(12)]
    assert all(t.isfinite().all() for t in load_file(MODEL).values())


@pytest.mark.parametrize("spoilt, flags, ended, stopped, kept", [
    ("gradients", ["--checkpoint_interval=6", "--max_bad_steps=1"], None, 9, 6),  # too many in a row
    ("gradients", ["--checkpoint_interval=2"], None, 12, 8),  # at the end
    ("gradients", ["--checkpoint_interval=2"], 9, 10, 8),  # by a signal
    ("weights", ["--checkpoint_interval=3"], None, 9, 6),  # at a checkpoint
    ("weights", ["--checkpoint_interval=5"], 9, 10, 5),  # by a signal
    ("weights", ["--checkpoint_interval=6"], None, 12, 6),  # at the end
])
def test_what_is_not_finite_is_never_saved(run, stdlib, monkeypatch, at_step, spoilt, flags, ended, stopped, kept):
    """Gradients from step 8 on, or the weights by step 8's learning rate: the run ends with its last good checkpoint,
    and names the last removal."""
    real = schedule.learning_rate_at
    if spoilt == "gradients":
        spoil_gradients(monkeypatch, range(8, 12))
    else:
        monkeypatch.setattr(schedule, "learning_rate_at", lambda k, *rest: math.inf if k == 8 else real(k, *rest))
    if ended:
        at_step(ended, lambda: signal.raise_signal(signal.SIGTERM))
    error = run(*REMOVAL, *flags).error
    assert f"step {stopped}" in error
    assert "out/run/ckpt.pt" in error
    assert ("ln_f" if stopped == 9 else "bos") in error
    assert saved_step() == kept
    assert not os.path.exists("out/run/model")


def test_a_loss_that_stays_far_up_after_an_event_is_said():
    events = [(30, "ln_2", 1), (50, "bos", None)]
    losses = {step: 3.0 if step < 30 else 3.4 for step in range(50)} | {50: 9.0}
    losses |= {step: 4.2 for step in range(51, 71)}
    assert "0.80" in schedule.still_far_up(losses, events, 70)
    # 0.4 above; too early; resumed: what was before is not known
    for logged, step in ((losses, 50), (losses, 69), ({70: 9.0}, 70)):
        assert schedule.still_far_up(logged, events, step) == ""


# --- checkpoints


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(run, stdlib):
    """A flipped bit, a cut end, the whole file."""
    assert run(*REMOVAL, "--checkpoint_interval=4").code == 0
    whole = Path(MODEL).read_bytes()
    last = Path("out/run/ckpt.pt")
    content = last.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    os.rename("out/run", "out/whole")
    for damaged in (flipped, content[:-100], None):
        shutil.copytree("out/whole", "out/run", dirs_exist_ok=True)
        last.write_bytes(damaged) if damaged else last.unlink()
        done = run(*REMOVAL, "--init_from=resume")
        assert done.code == 0, done.text
        assert "steps 8 to 12" in done.text
        assert ("out/run/ckpt-1.pt" in done.text) == bool(damaged)
        assert Path(MODEL).read_bytes() == whole


@pytest.mark.parametrize("last", [{"step": 2}, None])
def test_a_kill_between_any_two_changes_of_names_leaves_a_good_checkpoint(tmp_path, monkeypatch, last):
    """Also where the last one was damaged, and the one before it is all there is."""
    path = tmp_path / "ckpt.pt"
    for k in range(3):
        torch.save({"step": 1}, tmp_path / "ckpt-1.pt")
        torch.save(last, path) if last else path.write_bytes(b"damaged")
        pid = os.fork()  # a kill runs no clean-up
        if pid == 0:
            real, left = os.replace, [*range(k)]
            monkeypatch.setattr(os, "replace", lambda *paths: (left.pop(), real(*paths)) if left else os._exit(0))
            checkpoint.write(str(path), {"step": 3})
            os._exit(0)
        os.waitpid(pid, 0)
        good = [found for found in checkpoint.found(tmp_path) if Path(found).read_bytes() != b"damaged"]
        assert good, k
    assert torch.load(good[0], weights_only=True)["step"] == 3


def test_a_checkpoint_with_something_else_in_it_is_refused_in_one_line(run, stdlib):
    assert run("train.py", *SHORT, "--max_iters=1").code == 0
    whole = torch.load("out/run/ckpt.pt", weights_only=True)
    for key, value in [
        ("step", -1),
        ("step", "2"),
        ("model", {"transformer.wte.weight": 5}),
        ("model_config", whole["model_config"] | {"n_layer": 10**12}),
        ("ln_state", {"sites": {}}),
        ("optimizers", [5]),
        ("optimizers", [{"state": {0: {"exp_avg": torch.zeros(3)}}}]),
        ("settings", {"init_from": 5}),
        ("rng", [{"cpu": torch.zeros(3)}]),
        ("rng", [5]),
    ]:
        torch.save(whole | {key: value}, "out/run/ckpt.pt")
        assert "out/run" in run("train.py", *SHORT, "--max_iters=2", "--init_from=resume").error, key


# --- one run, and not two


@pytest.mark.slow
def test_auto_begins_goes_on_and_is_done(run, stdlib, tmp_path, at_step):
    at_step(5, lambda: signal.raise_signal(signal.SIGUSR1))
    auto = [*REMOVAL, "--init_from=auto"]
    assert run(*auto).code == 128 + signal.SIGUSR1
    assert "steps 6 to 12" in run(*auto).text
    assert run(*auto).code == 0
    os.makedirs("out/first")
    (tmp_path / unfinished("out/first/settings.json")).write_text("")  # a kill in the first moment left it
    assert run(*auto, "--out_dir=out/first").code == 0
    assert "seed 1337 -> 7" in run(*auto, "--seed=7").error
    resumed = run(*auto, "--seed=7", "--init_from=resume")  # asked for all the same
    assert resumed.code == 0
    assert "seed 1337 -> 7" in resumed.text


# --- data


def test_token_files_that_are_not_those_that_were_prepared_are_refused(run):
    """Another id, for train.py; the same ids in another order, for eval.py."""
    Path("a.txt").write_bytes(bytes(range(1, 256)) * 20)
    assert run("prepare_owt.py", "--files=a.txt", "--dataset=mine").code == 0
    tokens = read_tokens("train", "mine")
    tokens[700] += 1
    tokens.tofile("data/mine/train.bin")
    assert "data/mine/train.bin" in run("train.py", *SHORT, "--dataset=mine").error
    read_tokens("val", "mine")[::-1].tofile("data/mine/val.bin")
    assert "data/mine/val.bin" in run("eval.py", f"--models={TINY}", "--dataset=mine", "--block_size=32").error


def test_token_files_that_are_written_over_during_a_run_are_named(run, at_step):
    """Else reading beyond their new end would kill the process without a word."""
    write_dataset()
    at_step(3, lambda: os.truncate("data/mine/train.bin", 0))
    done = run("train.py", *SHORT, "--dataset=mine", "--checkpoint_interval=2")
    assert "data/mine/train.bin" in done.error
    assert torch.load("out/run/ckpt.pt", weights_only=True)["step"] == 2


def test_a_run_whose_data_vanish_goes_on_with_what_it_has_open(run, at_step):
    write_dataset()
    at_step(3, lambda: shutil.rmtree("data"))
    assert run("train.py", *SHORT, "--dataset=mine").code == 0


@pytest.mark.slow
def test_two_texts_of_one_name_are_two_data_sets(run):
    for name in "ab":
        os.mkdir(name)
        Path(name, "x.txt").write_text(name * 600)
    assert run("eval.py", f"--models={TINY}", "--dataset=a/x.txt,b/x.txt", "--json=table.json").code == 0
    first, second = read_json("table.json")["rows"]
    assert first["loss"] != second["loss"]
