"""configurator.py: config files and flags, in order and checked."""
import pytest

from configurator import configure


@pytest.fixture
def apply(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("# a comment\nlearning_rate = 1e-3\nout_dir = 'out/a'\nsteps = 5 * 8\n")
    (tmp_path / "control.py").write_text("out_dir = out_dir + '_control'\nrows = []\n")

    def apply(*argv):
        settings = dict(learning_rate=6e-4, out_dir="out", steps=10, compile=False, rows=[("ln_2", 1, 2)], _private=1, function=print)
        return configure(settings, argv, "doc")

    return apply


def test_without_arguments_the_defaults_stand(apply):
    assert apply() == dict(learning_rate=6e-4, out_dir="out", steps=10, compile=False, rows=[("ln_2", 1, 2)])


def test_files_and_flags_apply_in_order(apply):
    assert apply("a.py")["steps"] == 40
    assert apply("a.py", "control.py")["out_dir"] == "out/a_control" and apply("a.py", "control.py")["rows"] == []
    assert apply("a.py", "--out_dir=b", "control.py")["out_dir"] == "b_control"
    assert apply("--steps=3", "a.py")["steps"] == 40 and apply("a.py", "--steps=3")["steps"] == 3


@pytest.mark.parametrize("argv, key, value", [
    (["--steps=600_000"], "steps", 600_000), (["--steps", "7"], "steps", 7), (["--learning_rate=1"], "learning_rate", 1.0),
    (["--learning_rate", "3e-4"], "learning_rate", 3e-4), (["--compile=True"], "compile", True), (["--compile", "false"], "compile", False),
    (["--compile"], "compile", True), (["--compile", "--steps=3"], "compile", True),
    (["--out_dir=7"], "out_dir", "7"), (["--out_dir="], "out_dir", ""), (["--out_dir=a=b"], "out_dir", "a=b"),
    (["--rows=[('ln_f', 3, None)]"], "rows", [("ln_f", 3, None)]), (["--rows", "[]"], "rows", []),
])
def test_a_value_takes_the_type_of_its_default(apply, argv, key, value):
    assert apply(*argv)[key] == value and type(apply(*argv)[key]) is type(value)


@pytest.mark.parametrize("argv, message", [
    (["--learning_rat=1"], "unknown setting --learning_rat; did you mean learning_rate?"),
    (["--_private=1"], "unknown setting --_private"), (["--function=1"], "unknown setting --function"),
    (["--steps=1.5"], "--steps must be int, as 10 is, but it is 1.5"), (["--steps=many"], "--steps must be int"),
    (["--compile=1"], "--compile must be bool"), (["--learning_rate=True"], "--learning_rate must be float"),
    (["--learning_rate=1e999"], "must be a finite number"), (["--rows=ln_2"], "--rows must be list"),
    (["--steps"], "--steps needs a value"), (["missing.py"], "no config file missing.py"), (["steps=3"], "no config file steps=3"),
])
def test_what_it_can_not_take_ends_in_one_line(apply, argv, message):
    with pytest.raises(SystemExit) as stop:
        apply(*argv)
    assert message in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code


@pytest.mark.parametrize("text, message", [
    ("stepz = 3", "unknown setting stepz in bad.py; did you mean steps?"), ("steps = '3'", "steps in bad.py must be int"),
    ("steps = = 3", "bad.py is not a config file: SyntaxError"), ("import os", "bad.py is not a config file: ImportError"),
    ("steps = unknown", "bad.py is not a config file: NameError"),
])
def test_a_bad_config_file_ends_in_one_line(apply, tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        apply("bad.py")
    assert message in stop.value.code and "\n" not in stop.value.code


def test_help_lists_the_settings(apply, capsys):
    with pytest.raises(SystemExit) as stop:
        apply("--help")
    assert not stop.value.code and "--learning_rate=0.0006" in capsys.readouterr().out
