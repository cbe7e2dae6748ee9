"""eval.py and plot.py: what is reported of a run."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, set_all_fake
from test_train import SCHEDULE, SHORT

from model import GPT


@pytest.fixture
def finished(run, stdlib):
    """A short removal and its control, trained at a rate that moves the weights little."""
    rate = ["--learning_rate=1e-5", "--min_lr=1e-5"]
    assert run("train.py", *SHORT, *rate, f"--ln_schedule={SCHEDULE}", "--out_dir=out/demo").code == 0
    assert run("train.py", *SHORT, *rate, "--out_dir=out/demo_control").code == 0


def windows_by_hand(n, T):
    tokens = np.fromfile("data/stdlib/val.bin", dtype="<u2").astype(np.int64)
    gap = (len(tokens) - 1) // n
    return torch.stack([torch.from_numpy(tokens[i * gap : i * gap + T + 1]) for i in range(n)])


def test_loss_and_errors_against_transformers(run, stdlib, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    other = GPT.from_pretrained(TINY)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    other.save_pretrained("out/other/model")
    done = run("eval.py", f"--models={TINY},out/other", "--dataset=stdlib", "--tokens=2560", "--json=result.json")
    assert done.code == 0, done.text
    rows = json.load(open("result.json"))["rows"]
    x = windows_by_hand(10, 256)
    for row, source in zip(rows, (TINY, "out/other/model")):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(source).eval()(x[:, :-1]).logits
        by_window = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1)
        assert row["loss"] == pytest.approx(by_window.mean().item(), abs=1e-4)
        assert row["loss_se"] == pytest.approx(by_window.std().item() / 10**0.5, rel=1e-3)
        assert (row["windows"], row["tokens"]) == (10, 2560)


def test_by_default_the_last_runs_three_models_stand_side_by_side(run, finished):
    done = run("eval.py", "--tokens=2560", "--block_size=64", "--json=result.json")
    assert done.code == 0, done.text
    rows = json.load(open("result.json"))["rows"]
    assert [(r["role"], r["source"]) for r in rows] == [("original", TINY), ("control", "out/demo_control"), ("ln_free", "out/demo")]
    x = windows_by_hand(40, 64)
    losses = []
    for source in (TINY, "out/demo_control/model", "out/demo/model"):
        with torch.no_grad():
            logits = GPT.from_pretrained(source).eval()(x[:, :-1])[0]  # LN-free: not folded here, but in eval.py
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1))
    gap = losses[2] - losses[1]
    assert rows[2]["gap"] == pytest.approx(gap.mean().item(), abs=1e-4) and rows[2]["gap"] > 0.001
    assert rows[2]["gap_se"] == pytest.approx(gap.std().item() / 40**0.5, rel=1e-2)
    assert rows[0]["gap"] is None and rows[1]["gap"] is None
    table = done.text.splitlines()
    header = next(line for line in table if line.split() == ["original", "control", "LN-free"])
    assert f"{rows[2]['loss']:.4f} ± {rows[2]['loss_se']:.4f}" in table[table.index(header) + 2]
    assert f"{rows[2]['gap']:+.4f} ± {rows[2]['gap_se']:.4f}" in table[table.index(header) + 3]


def test_a_half_removed_model_is_not_called_ln_free(run, stdlib):
    model = GPT.from_pretrained(TINY)
    set_all_fake(model).set_ln_mode("ln_f", None, "real")
    model.save_pretrained("half")
    done = run("eval.py", "--models=half", "--tokens=512", "--json=result.json")
    assert done.code == 0 and json.load(open("result.json"))["rows"][0]["role"] == "part" and "part removed" in done.text


@pytest.mark.parametrize("args, message", [
    ([], "no finished removal under out/"), (["--models=nowhere"], "nowhere is not a directory here"),
    ([f"--models={TINY}", "--dataset=mine"], "run `python prepare_owt.py --dataset=mine`"),
    ([f"--models={TINY}", "--block_size=1024"], "block_size 1024 is beyond the 256 positions"),
    ([f"--models={TINY}", "--batch_size=0"], "batch_size must be 1 or more"),
    ([f"--models={TINY}", "--tokens=100"], "less than one window of 256"), ([f"--models={TINY}", "--tokens=512", "--json=no/where.json"], "no/where.json"),
])
def test_bad_input_ends_in_one_line(run, stdlib, args, message):
    done = run("eval.py", *args)
    assert done.code == 1 and message in done.text.splitlines()[-1] and "Traceback" not in done.text


def test_the_picture_names_every_event(run, finished, monkeypatch):
    from matplotlib.figure import Figure

    real_savefig, figures = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda fig, path, **k: (figures.append(fig), real_savefig(fig, path, **k)))
    done = run("plot.py", "out/demo")
    assert done.code == 0 and open("out/demo/loss.png", "rb").read(4) == b"\x89PNG"
    top, low = figures[0].axes
    texts = {text.get_text(): round(text.get_position()[0]) for text in top.texts}
    assert texts == {"h.0.ln_2": 1, "h.1.ln_2": 2, "h.2.ln_2": 3, "h.3.ln_2": 4, "h.0.ln_1qk + 3 more": 5, "h.0.ln_1v": 6, "h.1.ln_1v": 7,
                     "h.2.ln_1v": 8, "h.3.ln_1v, ln_f": 9, "eot off, bos off": 10}
    free = [e["loss"] for e in map(json.loads, open("out/demo/log.jsonl")) if "loss" in e]
    control = [e["loss"] for e in map(json.loads, open("out/demo_control/log.jsonl")) if "loss" in e]
    assert np.allclose(top.lines[0].get_ydata(), free) and np.allclose(low.lines[0].get_ydata(), np.subtract(free, control))


def test_a_picture_of_what_is_not_a_run_is_refused(run, tmp_path):
    assert "is not the out_dir of a run" in run("plot.py", "nothing").text
    assert "is not the out_dir of a run" in run("plot.py", __file__).text
    assert run("plot.py").code == 1 and os.listdir(tmp_path) == []
