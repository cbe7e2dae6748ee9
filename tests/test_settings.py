"""
configurator.py: config files and flags, applied in order and checked.
"""
import re
import runpy

import pytest
from conftest import default_settings

from configurator import configure
from parts.errors import UserError

SCRIPT = """
learning_rate = 6e-4  # of the optimizer
out_dir = "out"  # gets the results
steps = 10  # of the optimizer
share = 0.0  # dropped
dtype = "auto"  # of autocast
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
    (tmp_path / "a.py").write_text("# a comment\nlearning_rate = 1e-3\nout_dir = 'out/a'\nsteps = 5 * 8\n")
    (tmp_path / "control.py").write_text("out_dir = out_dir + '_control'\nrows = []\n")

    def apply(*argv, configs=True):
        return configure(runpy.run_path("script.py"), argv, "doc", **BOUNDS, configs=configs)

    return apply


def test_files_then_flags_apply_in_order(apply):
    assert apply() == DEFAULTS
    assert apply("a.py")["steps"] == 40
    assert apply("a.py", "control.py")["out_dir"] == "out/a_control"
    assert apply("a.py", "control.py")["rows"] == []
    assert apply("a.py", "--steps=3")["steps"] == 3


@pytest.mark.parametrize("argv, key, value", [
    (["--steps=600_000"], "steps", 600_000),
    (["--steps", "7"], "steps", 7),
    (["--steps=1"], "steps", 1),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate=2"], "learning_rate", 2.0),
    (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
    (["--share=0.999"], "share", 0.999),
    (["--dtype=float32"], "dtype", "float32"),
    (["--compile=True"], "compile", True),
    (["--compile", "false"], "compile", False),
    (["--compile"], "compile", True),
    (["--compile", "--steps=3"], "compile", True),
    (["--out_dir=7"], "out_dir", "7"),
    (["--out_dir="], "out_dir", ""),
    (["--out_dir=a=b"], "out_dir", "a=b"),
    (["--rows=[('ln_f', 3, None)]"], "rows", [("ln_f", 3, None)]),
    (["--rows", "[]"], "rows", []),
])
def test_a_value_takes_the_type_of_its_default(apply, argv, key, value):
    found = apply(*argv)[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("argv, names", [
    (["--learning_rat=1"], "--learning_rat; did you mean learning_rate"),
    (["--_private=1"], "--_private"),
    (["--function=1"], "--function"),
    (["--CONSTANT=2"], "--CONSTANT"),
    (["--steps=1.5"], "--steps"),
    (["--steps=many"], "--steps"),
    (["--steps=0"], "steps is 0"),
    (["--steps"], "--steps"),
    (["--compile=1"], "--compile"),
    (["--learning_rate=True"], "--learning_rate"),
    (["--learning_rate=1e999"], "--learning_rate"),
    (["--learning_rate=-1e-9"], "learning_rate is -1e-09"),
    (["--learning_rate=2.1"], "learning_rate is 2.1"),
    (["--share=1"], "share is 1.0"),
    (["--dtype=float16"], "dtype is 'float16'"),
    (["--rows=ln_2"], "--rows"),
    (["missing.py"], "missing.py"),
    (["steps=3"], "steps=3"),
    (["--steps=3", "a.py"], "a.py"),  # a config file after a flag
])
def test_what_it_can_not_take_is_refused_by_name(apply, argv, names):
    with pytest.raises(UserError, match=re.escape(names)):
        apply(*argv)


def test_a_pattern_that_the_shell_expanded_is_not_executed(apply, tmp_path):
    """`--files *.py` without quotes gives the first file to --files and the others as arguments."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    for argv, configs in ((["--out_dir", "a.py", "evil.py"], True), (["evil.py"], False)):
        with pytest.raises(UserError, match="evil.py"):
            apply(*argv, configs=configs)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text, names", [
    ("stepz = 3", "stepz in bad.py; did you mean steps"),
    ("steps = '3'", "steps in bad.py"),
    ("steps = = 3", "bad.py"),
    ("import os", "os in bad.py"),
    ("steps = unknown", "bad.py"),
    ("import sys; sys.exit(0)", "bad.py"),
    ("steps = 0", "steps is 0"),
])
def test_a_bad_config_file_is_refused(apply, tmp_path, text, names):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(names)):
        apply("bad.py")


def test_a_config_file_can_compute_its_rows_and_keep_names_of_its_own(apply, tmp_path):
    (tmp_path / "rows.py").write_text("_begin = 3\nrows = [(f'h.{i}.ln_2', _begin + i, None) for i in range(2)]\n")
    assert apply("rows.py") == DEFAULTS | dict(rows=[("h.0.ln_2", 3, None), ("h.1.ln_2", 4, None)])


def test_init_from_auto_keeps_what_a_new_run_starts_from(tmp_path):
    (tmp_path / "config.py").write_text("init_from = 'gpt2'\n")
    (tmp_path / "auto.py").write_text("init_from = 'auto'\n")
    for argv in (["config.py", "--init_from=auto"], ["config.py", "auto.py"]):
        argv = [arg if arg[0] == "-" else str(tmp_path / arg) for arg in argv]
        found = configure(default_settings(), argv, "", configs=True)
        assert (found["init_from"], found["auto"]) == ("gpt2", True)


@pytest.mark.parametrize("script, args", [
    ("train.py", ["--max_iters=0"]),
    ("train.py", ["--min_lr=-1"]),
    ("train.py", ["--dropout=1"]),
    ("train.py", ["--beta1=1"]),
    ("train.py", ["--beta2=1"]),
    ("train.py", ["--kl_share=1.5"]),
    ("train.py", [f"--seed={2**63}"]),
    ("train.py", ["--dtype=none"]),
    ("train.py", ["--std_over=none"]),
    ("eval.py", ["--dtype=none"]),
    ("eval.py", ["--batch_size=0"]),
    ("tools.sample", ["none", f"--seed={2**63}"]),
    ("tools.sample", ["none", "--dtype=none"]),
    ("tools.export", ["none", "--to=none"]),
    ("tools.export", ["none", "--dtype=none"]),
    ("dev.bench", ["--what=none"]),
])
def test_a_value_out_of_bounds_is_refused_by_the_script(run, script, args):
    assert args[-1][2:].partition("=")[0] in run(script, *args).error


def test_help_lists_the_settings_with_their_meaning(apply, capsys):
    with pytest.raises(SystemExit) as stop:
        apply("--help")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert [re.split(" {2,}", line.strip()) for line in printed.splitlines() if "--" in line] == [
        ["--learning_rate=0.0006", "of the optimizer"],
        ["--out_dir='out'", "gets the results"],
        ["--steps=10", "of the optimizer"],
        ["--share=0.0", "dropped"],
        ["--dtype='auto'", "of autocast"],
        ["--compile=False", "a few minutes once; then faster"],
        ["--rows=[('ln_2', 1, 2)]", "see schedule.py"],
    ]


@pytest.mark.parametrize("script", ["train.py", "eval.py", "prepare_owt.py", "tools.sample", "tools.export",
                                    "tools.lens", "tools.plot", "dev.bench", "dev.gpu", "dev.ablations"])
def test_help_of_each_script_says_how_it_is_run_and_what_each_setting_means(run, script):
    done = run(script, "--help")
    assert done.code == 0
    assert ("python " if script.endswith(".py") else "python -m ") + script in done.text
    for line in done.text.splitlines():
        if line.startswith("  --") and script != "tools.plot":
            assert re.fullmatch(r"  --\w+=.*\s{1,}\S.*", line), line
