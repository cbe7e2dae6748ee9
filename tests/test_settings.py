"""
configurator.py: config files and flags, applied in order and checked.
"""
import re
import runpy

import pytest
from conftest import REPO, default_settings

from configurator import configure
from parts.errors import UserError

SCRIPT = """
learning_rate = 6e-4  # the peak
out_dir = "out"  # gets the results
steps = 10  # optimizer steps
share = 0.0  # dropped
dtype = "auto"  # the autocast dtype
compile = False  # a few minutes once; then faster
rows = [("ln_2", 1, 2)]  # see schedule.py
_private = 1
CONSTANT = 1


def function():
    pass
"""
DEFAULTS = dict(learning_rate=6e-4, out_dir="out", steps=10, share=0.0, dtype="auto", compile=False,
                rows=[("ln_2", 1, 2)])
BOUNDS = dict(at_least=dict(steps=1), at_most=dict(learning_rate=2), below=dict(share=1),
              choices=dict(dtype=("auto", "float32")))


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """apply(args...) gives the settings of SCRIPT with these arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "a.py").write_text("# a comment\nlearning_rate = 1e-3\nout_dir = 'out/a'\n_own = 8\nsteps = 5 * _own\n")
    (tmp_path / "control.py").write_text("out_dir = out_dir + '_control'\nrows = []\n")

    def apply(*argv, configs=True):
        return configure(runpy.run_path("script.py"), argv, "doc", **BOUNDS, configs=configs)

    return apply


def test_files_then_flags_apply_in_order(apply):
    """a.py computes its steps with a name of its own."""
    assert apply() == DEFAULTS
    assert apply("a.py")["steps"] == 40
    assert apply("a.py", "control.py")["out_dir"] == "out/a_control"
    assert apply("a.py", "control.py")["rows"] == []
    assert apply("a.py", "--steps=3")["steps"] == 3


def test_a_value_takes_the_type_of_its_default(apply):
    for argv, key, value in [
        (["--steps=600_000"], "steps", 600_000),
        (["--steps", "1"], "steps", 1),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--compile", "false"], "compile", False),
        (["--compile", "--steps=3"], "compile", True),
        (["--out_dir=7"], "out_dir", "7"),
        (["--out_dir="], "out_dir", ""),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--rows=[('ln_f', 3, None)]"], "rows", [("ln_f", 3, None)]),
    ]:
        found = apply(*argv)[key]
        assert (found, type(found)) == (value, type(value)), argv


@pytest.mark.parametrize("args", [
    "--steps=1.5", "--steps=many", "--steps=0", "--compile=1", "--learning_rate=True", "--learning_rate=1e999",
    "--learning_rate=-1e-9", "--learning_rate=2.1", "--share=1", "--dtype=float16", "--rows=ln_2", "--learning_rat=1",
    "--_private=1", "--function=1", "--CONSTANT=2", "--steps", "steps=3", "missing.py", "--steps=3 a.py",
])
def test_what_it_can_not_take_is_refused_by_name(apply, args):
    """The last one is a config file after a flag."""
    *_, bad = args.split()
    with pytest.raises(UserError, match=bad.removeprefix("--").partition("=")[0]):
        apply(*args.split())


def test_a_pattern_that_the_shell_expanded_is_not_executed(apply, tmp_path):
    """`--files *.py` without quotes gives the first file to --files and the others as arguments."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    for argv, configs in ((["--out_dir", "a.py", "evil.py"], True), (["evil.py"], False)):
        with pytest.raises(UserError, match="evil.py"):
            apply(*argv, configs=configs)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["stepz = 3", "steps = '3'", "steps = = 3", "import os", "steps = unknown",
                                  "import sys; sys.exit(0)"])
def test_a_bad_config_file_is_refused(apply, tmp_path, text):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match="bad.py"):
        apply("bad.py")


def test_init_from_auto_keeps_what_a_new_run_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("init_from = 'gpt2'\n")
    (tmp_path / "auto.py").write_text("init_from = 'auto'\n")
    for argv in (["config.py", "--init_from=auto"], ["config.py", "auto.py"]):
        found = configure(default_settings(), argv, "", configs=True)
        assert (found["init_from"], found["auto"]) == ("gpt2", True)


@pytest.mark.parametrize("name", ["control.py", "faithful.py"])
def test_a_config_that_must_come_after_the_removal_is_refused_before_it(run, name):
    assert name in run("train.py", f"{REPO}/config/{name}", f"{REPO}/config/remove_ln_tiny.py").error


@pytest.mark.parametrize("script, flags", [
    ("train.py", ["--max_iters=0", "--min_lr=-1", "--dropout=1", "--beta1=1", "--beta2=1", "--kl_share=1.5",
                  f"--seed={2**63}", "--dtype=none", "--std_over=none"]),
    ("eval.py", ["--dtype=none", "--batch_size=0", "--tokens=-1"]),
    ("dev.bench", ["--what=none"]),
])
def test_a_value_out_of_bounds_is_refused_by_the_script(run, script, flags):
    for flag in flags:
        assert flag[2:].partition("=")[0] in run(script, flag).error


@pytest.mark.parametrize("script", ["train.py", "eval.py", "prepare_owt.py", "tools.sample", "tools.export",
                                    "tools.lens", "tools.plot", "dev.bench", "dev.ablations"])
def test_help_of_each_script_says_how_it_is_run_and_what_each_setting_means(run, script):
    done = run(script, "--help")
    assert done.code == 0
    if script == "train.py":
        assert all(f"  --{name}={value!r} " in done.text for name, value in default_settings().items())
    assert ("python " if script.endswith(".py") else "python -m ") + script in done.text
    for line in done.text.splitlines():
        if line.startswith("  --") and script != "tools.plot":
            assert re.fullmatch(r"  --\w+=.*\s{1,}\S.*", line), line
