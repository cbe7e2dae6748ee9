"""
plot.py: a picture of a run, with each of its events named, and one of a residual stream.
"""
import os

import numpy as np
import pytest
from conftest import read_log

from tools import plot


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, figure by figure."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_the_picture_has_a_line_for_every_event_and_a_name_for_every_kind(run, finished, tmp_path, figures):
    for _ in range(2):  # the second one replaces the first
        done = run("tools.plot", "out/demo")
        assert done.code == 0, done.text
    assert (tmp_path / "out/demo/loss.png").read_bytes().startswith(b"\x89PNG")
    top, low = figures[0].axes
    names = {text.get_text(): text.get_position()[0] for text in top.texts if text.get_rotation()}
    assert list(names) == ["ln_2 x 4", "ln_1qk x 4", "ln_1v x 4", "ln_f", "eot off", "bos off"]
    steps = [round(x) for x in names.values()]
    assert steps == [1, 5, 6, 9, 10, 10]
    assert np.diff(list(names.values())).min() > 0.1  # of 12 steps: none on another
    lines = [line.get_xdata()[0] for line in top.lines if list(line.get_ydata()) == [0, 1]]
    assert lines == [1, 2, 3, 4, *[5] * 4, 6, 7, 8, 9, 9, 10, 10]

    free, control = read_log("out/demo", "loss"), read_log("out/demo_control", "loss")
    assert np.allclose(list(top.lines[0].get_ydata()), free)
    assert np.allclose(list(low.lines[0].get_ydata()), np.subtract(free, control))
    notes = [text.get_text() for text in top.texts if not text.get_rotation()]
    assert notes == [f"{free[10]:.2f} right after bos off"]
    assert "nats per byte" in top.get_ylabel()
    figures[0].canvas.draw()
    for axis in (top, low):  # the legend covers nothing
        assert axis.get_legend().get_window_extent().x0 > axis.get_window_extent().x1


def test_smoothing_is_a_mean_over_a_fortieth_of_the_steps():
    values = np.random.default_rng(0).normal(size=400)
    by_hand = [values[max(0, i - 5) : i + 6].mean() for i in range(400)]
    assert np.allclose(plot.smoothed(values), by_hand)
    assert np.allclose(plot.smoothed([1, 5, 2]), [1, 5, 2])


def test_the_picture_of_the_residual_stream(run, finished, figures):
    """Where lines coincide, each one shows. A picture outside a run's folder replaces nothing."""
    assert run("eval.py", "--dataset=residual", "--tokens=1280", "--json=r.json").code == 0
    done = run("tools.plot", "r.json")
    assert done.code == 0, done.text
    assert done.text == "r.png\n"
    for axis in figures[-1].axes:
        assert [line.get_linewidth() for line in axis.lines] == [5, 3, 1]
    assert "r.png" in run("tools.plot", "r.json").error


@pytest.mark.parametrize("name", ["loss.png", "lens.png", "mine.png"])
def test_a_picture_replaces_only_one_of_its_own_in_a_runs_folder(tmp_path, name):
    path = str(tmp_path / name)
    plot.check_picture(path)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=name):
        plot.check_picture(path)
    (tmp_path / "settings.json").write_text('{"init_from": "a", "dataset": "b", "ln_schedule": []}')
    if name == "mine.png":
        with pytest.raises(ValueError, match=name):
            plot.check_picture(path)
    else:
        plot.check_picture(path)


@pytest.mark.parametrize("source", ["nothing", __file__, "nothing.json", "meta.json"])
def test_what_is_not_a_run_or_a_table_is_named(run, tmp_path, source):
    (tmp_path / "meta.json").write_text("{}")
    assert os.path.basename(source) in run("tools.plot", source).error
    assert os.listdir(tmp_path) == ["meta.json"]


@pytest.mark.parametrize("args", [[], ["out/one", "out/two"]])
def test_anything_but_one_source_is_answered_with_the_usage(run, args):
    assert "usage: python -m tools.plot" in run("tools.plot", *args).error


@pytest.mark.parametrize("line", ["5", "{}", "not JSON", '{"step": 1, "event": 5}', '{"step": 1, "event": "bos"}'])
def test_a_broken_log_is_named(run, line):
    os.makedirs("out/run")
    with open("out/run/log.jsonl", "w") as f:
        f.write(line + "\n")
    assert "out/run/log.jsonl" in run("tools.plot", "out/run").error
