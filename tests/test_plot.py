"""
tools/plot.py: a picture of a run, with each of its removals, and one of a residual stream.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import read_log
from matplotlib.figure import Figure

from tools import plot

PNG = b"\x89PNG"


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, figure by figure."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: (
        figures.append(figure), savefig(figure, *args, **kwargs)))
    return figures


def write(path, *lines):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_picture_has_a_line_for_every_event_and_a_name_for_every_kind(run, demo, figures):
    assert run("tools.plot", "out/demo").code == 0
    assert Path("out/demo/loss.png").read_bytes().startswith(PNG)
    top, low = figures[0].axes
    names = {text.get_text(): text.get_position()[0] for text in top.texts if text.get_rotation()}
    assert list(names) == ["ln_2 x 4", "ln_1qk x 4", "ln_1v x 4", "ln_f", "eot off", "bos off"]
    assert [round(x) for x in names.values()] == [1, 5, 6, 9, 10, 10]
    assert np.diff(list(names.values())).min() > 0.1  # the run has 12 steps; no name covers another
    lines = [line.get_xdata()[0] for line in top.lines if list(line.get_ydata()) == [0, 1]]
    assert lines == [1, 2, 3, 4, *[5] * 4, 6, 7, 8, 9, 9, 10, 10]

    free = read_log("out/demo", "loss")
    assert np.allclose(top.lines[0].get_ydata(), free)
    assert np.allclose(low.lines[0].get_ydata(), np.subtract(free, read_log("out/demo_control", "loss")))
    spike = f"{max(free[10:]):.2f} after bos off"
    assert [text.get_text() for text in top.texts if not text.get_rotation()] == [spike]
    for axis in (top, low):  # the legend covers nothing
        figures[0].canvas.draw()
        assert axis.get_legend().get_window_extent().x0 > axis.get_window_extent().x1


def test_smoothing_is_a_mean_over_a_fortieth_of_the_steps():
    values = np.random.default_rng(0).normal(size=400)
    by_hand = [values[max(0, i - 5) : i + 6].mean() for i in range(400)]
    assert np.allclose(plot.smoothed(values), by_hand)
    assert np.allclose(plot.smoothed([1, 5, 2]), [1, 5, 2])


def test_only_the_picture_of_a_run_is_drawn_anew(run, figures):
    """The log has a term of another objective, and the control has just begun. Of the residual stream of two models,
    a line that lies on another one shows it on both sides."""
    sites = dict(ln_f=dict(others=dict(mean=2.0, spread=0.5), eot=None))
    row = dict(dataset="residual", role="original", source="hf", sink_rate=0.5, sites=sites)
    write("out/run/log.jsonl", dict(step=0, val_loss=3.0), dict(step=0, loss=3.0, kl=0.1), dict(step=1, event="ln_f"))
    write("out/run_control/log.jsonl", dict(step=0, run="0123"))
    write("out/run/settings.json", dict(init_from="gpt2", dataset="owt", ln_schedule=[]))
    write("r.json", dict(rows=[row, row, row]))
    for _ in range(2):
        assert run("tools.plot", "out/run").code == 0
    os.remove("out/run/settings.json")
    assert "out/run/loss.png" in run("tools.plot", "out/run").error

    assert run("tools.plot", "r.json").text == "r.png\n"
    lines = [(line.get_linewidth(), line.get_ydata().tolist()) for line in figures[-1].axes[0].lines]
    assert lines == [(5, [2.0]), (3, [2.0]), (1, [2.0])]
    assert Path("r.png").read_bytes().startswith(PNG)
    assert "r.png" in run("tools.plot", "r.json").error


@pytest.mark.parametrize("args, named", [
    ([], "tools.plot"),
    (["out/one", "out/two"], "out/two"),
    (["nothing"], "nothing/log.jsonl"),
    (["out/run"], "out/run/log.jsonl"),
    (["table.json"], "table.json"),
])
def test_a_picture_of_anything_else_is_refused(run, args, named):
    write("out/run/log.jsonl", {})
    write("table.json", {})
    assert named in run("tools.plot", *args).error
    assert sorted(os.listdir()) == ["out", "table.json"]
