"""
configurator.py: config files and flags, in order and checked. What a setting means, and its bound, stand
in the comment behind its default.
"""
import os
import re
import runpy

import pytest
from conftest import REPO

from configurator import check_bound, configure
from parts.errors import UserError, show

SCRIPT = """
learning_rate = 6e-4  # >= 0: of the optimizer
out_dir = "out"  # gets the results
steps = 10  # >= 1: of the optimizer
share = 0.0  # >= 0 and < 1: of what is dropped
dtype = "auto"  # auto, float32 or bfloat16: of autocast
compile = False  # a few minutes once; then faster
rows = [("ln_2", 1, 2)]  # see schedule.py
_private = 1
CONSTANT = 1


def function():
    pass
"""
DEFAULTS = dict(
    learning_rate=6e-4,
    out_dir="out",
    steps=10,
    share=0.0,
    dtype="auto",
    compile=False,
    rows=[("ln_2", 1, 2)],
)


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """apply(args...) gives the settings of SCRIPT with these arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "a.py").write_text("# a comment\nlearning_rate = 1e-3\nout_dir = 'out/a'\nsteps = 5 * 8\n")
    (tmp_path / "control.py").write_text("out_dir = out_dir + '_control'\nrows = []\n")

    def apply(*argv):
        return configure(runpy.run_path("script.py"), argv, "doc")

    return apply


@pytest.fixture
def refused(apply, capsys):
    """refused(args...) is the one line that a script with these arguments ends with."""

    def refused(*argv):
        with pytest.raises(UserError) as caught:
            apply(*argv)
        show(caught.type, caught.value, caught.tb)  # as Python does at the end
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
        return printed

    return refused


# --- values


def test_without_arguments_the_defaults_stand(apply):
    assert apply() == DEFAULTS


def test_files_and_flags_apply_in_order(apply):
    assert apply("a.py")["steps"] == 40
    assert apply("a.py", "control.py")["out_dir"] == "out/a_control"
    assert apply("a.py", "control.py")["rows"] == []
    assert apply("a.py", "--out_dir=b", "control.py")["out_dir"] == "b_control"
    assert apply("--steps=3", "a.py")["steps"] == 40
    assert apply("a.py", "--steps=3")["steps"] == 3


@pytest.mark.parametrize("argv, key, value", [
    (["--steps=600_000"], "steps", 600_000),
    (["--steps", "7"], "steps", 7),
    (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
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


@pytest.mark.parametrize("argv, message", [
    (["--learning_rat=1"], "unknown setting --learning_rat; did you mean learning_rate?"),
    (["--_private=1"], "unknown setting --_private"),
    (["--function=1"], "unknown setting --function"),
    (["--CONSTANT=2"], "unknown setting --CONSTANT"),
    (["--steps=1.5"], "--steps must be int, as 10 is, but it is 1.5"),
    (["--steps=many"], "--steps must be int"),
    (["--compile=1"], "--compile must be bool"),
    (["--learning_rate=True"], "--learning_rate must be float"),
    (["--learning_rate=1e999"], "must be a finite number"),
    (["--rows=ln_2"], "--rows must be list"),
    (["--steps"], "--steps needs a value"),
    (["missing.py"], "no config file missing.py"),
    (["steps=3"], "no config file steps=3"),
])
def test_what_it_can_not_take_ends_in_one_line(refused, argv, message):
    assert message in refused(*argv)


@pytest.mark.parametrize("text, message", [
    ("stepz = 3", "unknown setting stepz in bad.py; did you mean steps?"),
    ("steps = '3'", "steps in bad.py must be int"),
    ("steps = = 3", "bad.py is not a config file: SyntaxError"),
    ("import os", "unknown setting os in bad.py"),
    ("steps = unknown", "bad.py is not a config file: NameError"),
    ("steps = 0", "steps is 0, but it must be 1 or more"),
])
def test_a_bad_config_file_ends_in_one_line(refused, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    assert message in refused("bad.py")


def test_a_config_file_can_compute_its_rows_and_keep_names_of_its_own(apply, tmp_path):
    (tmp_path / "rows.py").write_text("_begin = 3\nrows = [(f'h.{i}.ln_2', _begin + i, None) for i in range(2)]\n")
    assert apply("rows.py") == DEFAULTS | dict(rows=[("h.0.ln_2", 3, None), ("h.1.ln_2", 4, None)])


# --- bounds


@pytest.mark.parametrize("arg, message", [
    ("--steps=0", "steps is 0, but it must be 1 or more"),
    ("--learning_rate=-1e-9", "learning_rate is -1e-09, but it must be 0 or more"),
    ("--share=-0.1", "share is -0.1, but it must be 0 or more, and below 1"),
    ("--share=1", "share is 1.0, but it must be 0 or more, and below 1"),
    ("--dtype=float16", "dtype is 'float16', but it must be auto, float32 or bfloat16"),
    ("--dtype=", "dtype is '', but it must be auto, float32 or bfloat16"),
])
def test_the_bound_in_the_comment_behind_a_setting_is_checked(refused, arg, message):
    assert message in refused(arg)


@pytest.mark.parametrize("arg, key, value", [
    ("--steps=1", "steps", 1),
    ("--learning_rate=0", "learning_rate", 0.0),
    ("--share=0.999", "share", 0.999),
    ("--dtype=bfloat16", "dtype", "bfloat16"),
])
def test_a_value_at_its_bound_is_taken(apply, arg, key, value):
    assert apply(arg)[key] == value


@pytest.mark.parametrize("value, comment, message", [
    (1, ">= 2: rows", "it is 1, but it must be 2 or more"),
    (-1, ">= 0 and < 1: a share", "it is -1, but it must be 0 or more, and below 1"),
    (1, ">= 0 and < 1: a share", "it is 1, but it must be 0 or more, and below 1"),
    (0.4, ">= 0.5 and < 1: a share", "it is 0.4, but it must be 0.5 or more, and below 1"),
    ("c", "a or b: the form", "it is 'c', but it must be a or b"),
    ("b ", "a, b or c: the form", "it is 'b ', but it must be a, b or c"),
])
def test_check_bound_says_what_the_value_must_be(value, comment, message):
    with pytest.raises(UserError) as caught:
        check_bound("it", value, comment)
    assert str(caught.value) == message


@pytest.mark.parametrize("value, comment", [
    (2, ">= 2: rows"),
    (0.5, ">= 0.5 and < 1: a share"),
    ("a", "a, b or c: the form"),
    ("b", "a, b or c: the form"),
    ("c", "a, b or c: the form"),
    (-1, "steps of the optimizer"),
    (-1, ""),
    ("d", "a, b or c, the first that is there"),  # no colon: not a bound
    ("d", "a folder, or b: the form"),
])
def test_check_bound_lets_the_rest_pass(value, comment):
    check_bound("it", value, comment)


@pytest.mark.parametrize("script, ends_soon", [
    ("train.py", ["--dataset=none"]),
    ("eval.py", ["--models=none"]),
    ("sample.py", ["none"]),
    ("prepare_owt.py", ["--dataset=none"]),
    ("bench.py", ["--way=none"]),
])
def test_every_number_among_the_settings_has_a_bound_that_is_checked(run, script, ends_soon):
    """A slip in a comment would switch its check off, and nothing else would show it."""
    with open(os.path.join(REPO, script)) as f:
        _, settings, _ = re.split(r"^# -+$", f.read(), flags=re.MULTILINE)  # they stand between two rulers
    names = re.findall(r"^(\w+) = [-.\d]", settings, re.MULTILINE)
    assert names
    unchecked = []
    for name in names:
        error = run(script, *ends_soon, f"--{name}=-1").error
        if f"error: {name} is -1" not in error or "but it must be" not in error:
            unchecked.append(name)
    assert unchecked == []


@pytest.mark.parametrize("script, arg, message", [
    ("train.py", "--dropout=1", "dropout is 1.0, but it must be 0 or more, and below 1"),
    ("train.py", "--beta1=1", "beta1 is 1.0, but it must be 0 or more, and below 1"),
    ("train.py", "--beta2=1", "beta2 is 1.0, but it must be 0 or more, and below 1"),
    ("train.py", f"--seed={2**63}", f"seed is {2**63}, but it must be 0 or more, and below {2**63}"),
    ("train.py", "--dtype=none", "dtype is 'none', but it must be auto, float32 or bfloat16"),
    ("eval.py", "--dtype=none", "dtype is 'none', but it must be float32 or bfloat16"),
    ("sample.py", f"--seed={2**63}", f"seed is {2**63}, but it must be 0 or more, and below {2**63}"),
    ("sample.py", "--dtype=none", "dtype is 'none', but it must be float32 or bfloat16"),
    ("export.py", "--to=none", "to is 'none', but it must be hf or folded"),
    ("export.py", "--dtype=none", "dtype is 'none', but it must be float32, bfloat16 or float16"),
    ("bench.py", "--what=none", "what is 'none', but it must be train, eval, hellaswag, sample, prepare, cost or hours"),
])
def test_the_scripts_other_bounds(run, script, arg, message):
    source = ["none"] if script in ("sample.py", "export.py") else []
    assert message in run(script, *source, arg).error


# --- help


def test_help_lists_the_settings_with_the_comments_behind_them(apply, capsys):
    with pytest.raises(SystemExit) as stop:
        apply("--help")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "--learning_rate=0.0006" in printed
    assert [re.split(" {2,}", line.strip()) for line in printed.splitlines() if "--" in line] == [
        ["--learning_rate=0.0006", ">= 0: of the optimizer"],
        ["--out_dir='out'", "gets the results"],
        ["--steps=10", ">= 1: of the optimizer"],
        ["--share=0.0", ">= 0 and < 1: of what is dropped"],
        ["--dtype='auto'", "auto, float32 or bfloat16: of autocast"],
        ["--compile=False", "a few minutes once; then faster"],
        ["--rows=[('ln_2', 1, 2)]", "see schedule.py"],
    ]
