"""
plot.py: a picture of a run, with each of its events named, and one of a residual stream.
"""
import os

import numpy as np
import pytest
from conftest import read_log

PNG = b"\x89PNG"


def test_the_picture_names_every_event(run, finished, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    done = run("plot.py", "out/demo")

    assert done.code == 0, done.text
    assert (tmp_path / "out/demo/loss.png").read_bytes().startswith(PNG)
    top, low = figures[0].axes
    steps = {text.get_text(): round(text.get_position()[0]) for text in top.texts}
    assert steps == {
        "h.0.ln_2": 1,
        "h.1.ln_2": 2,
        "h.2.ln_2": 3,
        "h.3.ln_2": 4,
        "h.0.ln_1qk + 3 more": 5,
        "h.0.ln_1v": 6,
        "h.1.ln_1v": 7,
        "h.2.ln_1v": 8,
        "h.3.ln_1v, ln_f": 9,
        "eot off, bos off": 10,
    }
    free = read_log("out/demo", "loss")
    control = read_log("out/demo_control", "loss")
    assert np.allclose(top.lines[0].get_ydata(), free)
    assert np.allclose(low.lines[0].get_ydata(), np.subtract(free, control))


def test_the_picture_of_the_residual_stream(run, finished, tmp_path):
    assert run("eval.py", "--dataset=residual", "--tokens=1280", "--json=r.json").code == 0
    done = run("plot.py", "r.json")
    assert done.code == 0, done.text
    assert done.text == "r.png\n"
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)

    done = run("plot.py", "data/stdlib/meta.json")
    assert "has no row of --dataset=residual" in done.error


def test_a_picture_of_what_is_not_a_run_is_refused(run, tmp_path):
    assert "is not the out_dir of a run" in run("plot.py", "nothing").error
    assert "is not the out_dir of a run" in run("plot.py", __file__).error
    assert "usage: python plot.py" in run("plot.py").error
    assert "usage: python plot.py" in run("plot.py", "out/one", "out/two").error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("line", ["5", "{}", "not JSON"])
def test_a_log_that_is_none_is_named(run, line):
    os.makedirs("out/run")
    with open("out/run/log.jsonl", "w") as f:
        f.write(line + "\n")
    assert "out/run/log.jsonl is not a log of train.py" in run("plot.py", "out/run").error
