"""
tools/plot.py: a picture of a run, with each of its removals, and one of a residual stream.
"""
import json
import os

import numpy as np
import pytest
from conftest import read_log

from tools import plot

PNG = b"\x89PNG"


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
    done = run("tools.plot", "out/demo")

    assert done.code == 0, done.text
    assert (tmp_path / "out/demo/loss.png").read_bytes().startswith(PNG)
    top, low = figures[0].axes
    names = {text.get_text(): text.get_position()[0] for text in top.texts if text.get_rotation()}
    assert list(names) == ["ln_2 x 4", "ln_1qk x 4", "ln_1v x 4", "ln_f", "eot off", "bos off"]
    steps = [round(x) for x in names.values()]
    assert steps == [1, 5, 6, 9, 10, 10]
    assert np.diff(list(names.values())).min() > 0.1  # of 12 steps: none on another
    lines = [line.get_xdata()[0] for line in top.lines if list(line.get_ydata()) == [0, 1]]
    assert lines == [1, 2, 3, 4, *[5] * 4, 6, 7, 8, 9, 9, 10, 10]

    free = read_log("out/demo", "loss")
    control = read_log("out/demo_control", "loss")
    assert np.allclose(top.lines[0].get_ydata(), free)
    assert np.allclose(low.lines[0].get_ydata(), np.subtract(free, control))
    spike = f"{max(free[10:]):.2f} after bos off"
    assert [text.get_text() for text in top.texts if not text.get_rotation()] == [spike]
    assert "nats per byte" in top.get_ylabel()
    for axis in (top, low):  # the legend covers nothing
        figures[0].canvas.draw()
        assert axis.get_legend().get_window_extent().x0 > axis.get_window_extent().x1


def test_smoothing_is_a_mean_over_a_fortieth_of_the_steps():
    values = np.random.default_rng(0).normal(size=400)
    by_hand = [values[max(0, i - 5) : i + 6].mean() for i in range(400)]
    assert np.allclose(plot.smoothed(values), by_hand)
    assert np.allclose(plot.smoothed([1, 5, 2]), [1, 5, 2])


def test_the_picture_of_the_residual_stream(run, finished, tmp_path, figures):
    """A line that lies on another one shows it on both sides."""
    assert run("eval.py", "--dataset=residual", "--tokens=1280", "--json=r.json").code == 0
    done = run("tools.plot", "r.json")
    assert done.code == 0, done.text
    assert done.text == "r.png\n"
    for axis in figures[-1].axes:
        assert [line.get_linewidth() for line in axis.lines] == [5, 3, 1]
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def write(path, *lines):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def test_only_the_picture_of_a_run_is_drawn_anew(run):
    """The log has a term of another objective, and the control has just begun."""
    log = [dict(step=0, val_loss=3.0), dict(step=0, loss=3.0, kl=0.1), dict(step=1, event="ln_f")]
    sites = dict(ln_f=dict(others=dict(mean=2.0, spread=0.5), eot=None))
    row = dict(dataset="residual", role="original", source="hf", sink_rate=0.5, sites=sites)
    write("out/run/log.jsonl", *log)
    write("out/run_control/log.jsonl", dict(step=0, run="0123"))
    write("out/run/settings.json", dict(init_from="gpt2", dataset="owt", ln_schedule=[]))
    write("r.json", dict(rows=[row]))
    for _ in range(2):
        assert run("tools.plot", "out/run").code == 0
    os.remove("out/run/settings.json")
    assert "out/run/loss.png" in run("tools.plot", "out/run").error

    assert run("tools.plot", "r.json").code == 0
    assert "r.png" in run("tools.plot", "r.json").error
    assert os.listdir("out/run_control") == ["log.jsonl"]


@pytest.mark.parametrize("args, named", [
    ([], "usage: python -m tools.plot"),
    (["out/one", "out/two"], "out/two"),
    (["nothing"], "nothing/log.jsonl"),
    ([__file__], "log.jsonl"),
    (["out/run"], "out/run/log.jsonl"),
    (["table.json"], "table.json"),
])
def test_a_picture_of_anything_else_is_refused(run, args, named):
    write("out/run/log.jsonl", {})
    write("table.json", {})
    assert named in run("tools.plot", *args).error
    assert sorted(os.listdir()) == ["out", "table.json"]
