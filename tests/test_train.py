"""
train.py: the order of its data, a whole run with every removal in its log, and a run that is interrupted or killed and
ends as if it had not been.
"""
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCHEDULE, SHORT, TINY, even_windows, read_json, read_log, read_tokens
from transformers import AutoModelForCausalLM

from model import GPT
from parts import checkpoint, data
from parts.device import flops_per_token
from parts.errors import UserError
from parts.files import unfinished

MODEL = "out/run/model/model.safetensors"


def test_the_same_seed_and_step_give_the_same_windows():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = data.train_starts(tokens, 1, 7, 64, 10)
    assert (starts == data.train_starts(tokens, 1, 7, 64, 10)).all()
    assert (starts != data.train_starts(tokens, 1, 8, 64, 10)).any()
    assert (starts != data.train_starts(tokens, 2, 7, 64, 10)).any()
    assert set(data.train_starts(tokens[:12], 0, 0, 200, 10)) == {0, 1}  # both windows that fit, no other


def test_windows_are_inputs_and_the_next_tokens():
    x, y = data.read_windows(np.arange(100, dtype=np.uint16), [3, 50], 4, "cpu")
    assert x.tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]]
    assert y.tolist() == [[4, 5, 6, 7], [51, 52, 53, 54]]
    # those of val are spread evenly and never overlap
    tokens = np.zeros(1001, dtype=np.uint16)
    assert data.val_starts(tokens, 4, 100).tolist() == [0, 250, 500, 750]
    assert data.val_starts(tokens, 50, 100).tolist() == [100 * i for i in range(10)]


# --- a whole run


@pytest.fixture
def removal(run, stdlib):
    """removal("--seed=2"): the short run of train.py that removes all of the bundled model's LayerNorms."""

    def removal(*args):
        return run("train.py", *SHORT, f"--ln_schedule={SCHEDULE}", *args)

    return removal


def test_a_run_removes_every_layernorm_and_leaves_its_four_files(removal):
    done = removal()
    assert " h.3.ln_2 fake, std " in done.text
    assert sorted(os.listdir("out/run")) == ["ckpt.pt", "log.jsonl", "model", "settings.json"]

    model = GPT.from_pretrained("out/run/model")
    assert model.ln_free()
    log = read_log()
    assert [(entry["step"], entry["event"]) for entry in log if "event" in entry] == [
        *[(1 + i, f"h.{i}.ln_2") for i in range(4)],
        *[(5, f"h.{i}.ln_1qk") for i in range(4)],
        *[(6 + i, f"h.{i}.ln_1v") for i in range(4)],
        *[(9, "ln_f"), (10, "eot"), (10, "bos")],
    ]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(12))
    logged = {entry["event"]: (entry["avg_std"], entry["bos_std"]) for entry in log if "avg_std" in entry}
    assert logged == {name: (site.avg_std.item(), site.bos_std.item()) for name, site in model.sites().items()}
    settings = read_json("out/run/settings.json")
    assert settings["ln_schedule"] == [list(row) for row in SCHEDULE]
    assert settings["n_embd"] == model.config.n_embd


def windows_of(step):
    """What a run reads at a step, cut from data/stdlib by the tested functions above: (4, 32)."""
    tokens = read_tokens("train", "stdlib")
    return data.read_windows(tokens, data.train_starts(tokens, 1337, step, 4, 32), 32, "cpu")[0]


def std_before(model, site, x):
    """The std of what a site reads of the windows x, by LayerNorm's formula in float64: (windows, T)."""
    seen = []
    hook = model.sites()[site].register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    return (seen[0].var(-1, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("std_over", ["ordinary", "all"])
def test_the_constants_of_an_event_are_those_of_its_batch_and_weights(removal, std_over):
    """Events at step 0 meet the bundled model's own weights: their std is measured here on the same windows, without
    the run's dropout. Over all tokens, as arXiv 2507.02559's, position 0 and end-of-text are tokens like others."""
    schedule = [("ln_2", 0, 0), ("ln_f", 0, None)]
    args = ["--dtype=float32", "--dropout=0.1", "--max_iters=1", f"--std_over={std_over}"]
    assert removal(f"--ln_schedule={schedule}", *args).code == 0
    x = windows_of(0)
    assert not (x == 256).any()  # no end-of-text: so the two micro-batches weigh the same in one
    entries = [entry for entry in read_log() if "avg_std" in entry]
    assert len(entries) == 5
    for entry in entries:
        std = std_before(GPT.from_pretrained(TINY), entry["event"], x)
        averaged = std[:, 1:] if std_over == "ordinary" else std
        assert entry["avg_std"] == pytest.approx(averaged.mean().item(), rel=1e-4)
        if std_over == "ordinary":
            assert entry["bos_std"] == pytest.approx(std[:, 0].mean().item(), rel=1e-4)


def test_noise_takes_the_place_of_text_in_the_batch_alone(removal, monkeypatch):
    """One sequence of each micro-batch of two, another one each time. Constants and loss are those of the text."""
    forward, trained_on = GPT.forward, []

    def spy(self, idx, *args, **kwargs):
        trained_on.extend([idx] if self.training else [])
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", spy)
    flags = ["--kl_share=0.5", "--noise_share=0.5", "--dtype=float32", "--max_iters=2"]
    assert removal("--ln_schedule=[('ln_f', 0, None)]", *flags).code == 0
    assert len({tuple(idx[0].tolist()) for idx in trained_on}) == 4  # two steps of two micro-batches
    tokens, model = read_tokens("train", "stdlib"), GPT.from_pretrained(TINY)
    x, y = data.read_windows(tokens, data.train_starts(tokens, 1337, 0, 4, 32)[[1, 3]], 32, "cpu")
    assert (torch.stack([idx[1] for idx in trained_on[:2]]) == x).all()
    model.measure_std(x)
    model.set_ln_mode("ln_f", None, "fake")
    assert read_log(key="avg_std") == pytest.approx([model.transformer.ln_f.avg_std.item()], rel=1e-5)
    assert read_log(key="loss")[0] == pytest.approx(model(x, y)[1].item(), rel=1e-5)


def test_constants_can_be_moving_averages_over_steps(removal):
    """At a learning rate of 0 the weights stay, so that each step's own std can be measured here."""
    still = ["--learning_rate=0", "--min_lr=0", "--weight_decay=0"]
    args = ["--ln_schedule=[('ln_f', 3, None)]", "--dtype=float32", "--std_momentum=0.7", "--max_iters=4"]
    assert removal(*args, *still).code == 0
    stds = [std_before(GPT.from_pretrained(TINY), "ln_f", windows_of(step))[:, 1:].mean() for step in range(4)]
    expected = 0.7**3 * stds[0] + 0.3 * (0.7**2 * stds[1] + 0.7 * stds[2] + stds[3])
    assert read_log(key="avg_std") == pytest.approx([expected.item()], rel=1e-4)


def test_the_control_sees_the_same_batches_and_keeps_its_layernorms(removal):
    assert removal("--max_iters=2", "--ln_schedule=[]", "--out_dir=out/control").code == 0
    assert removal("--max_iters=2", "--ln_schedule=[('h.2.ln_2', 1, None)]").code == 0
    free, control = (read_log(f"out/{name}", "loss") for name in ("run", "control"))
    assert free[0] == control[0]
    assert free[1] != control[1]  # the first event is at step 1
    for name, expected in (("run", ["h.2.ln_2"]), ("control", [])):
        modes = GPT.from_pretrained(f"out/{name}/model").ln_modes()
        assert [site for site, mode in modes.items() if mode == "fake"] == expected


def test_gradient_accumulation_is_one_large_batch(removal):
    losses = []
    for steps, size in ((1, 4), (4, 1)):
        flags = [f"--gradient_accumulation_steps={steps}", f"--batch_size={size}", f"--out_dir=out/{steps}"]
        assert removal("--ln_schedule=[]", "--dtype=float32", "--max_iters=4", *flags).code == 0
        losses.append(read_log(f"out/{steps}", "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation_is_the_mean_loss_of_the_even_windows(removal):
    """Before the first step, against transformers on the windows by hand."""
    assert removal("--dtype=float32", "--max_iters=1", "--ln_schedule=[]").code == 0
    windows = even_windows(4, 32)
    hf = AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        logits = hf(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:])
    assert read_log(key="val_loss")[0] == pytest.approx(expected.item(), abs=1e-5)


# --- interruption, and the log


def log_without_speed(folder):
    return [{key: entry[key] for key in entry if key not in ("tokens_per_s", "mfu")} for entry in read_log(folder)]


@pytest.mark.parametrize("step", [
    pytest.param(1, marks=pytest.mark.slow),  # the first event's
    5,  # in the midst of the events
    pytest.param(11, marks=pytest.mark.slow),  # the last
])
def test_an_interrupted_run_ends_with_the_same_bits(removal, at_step, step):
    """SIGTERM arrives while a step reads its data. Dropout and the std's average go on as they were, and
    what it learns from is the same original."""
    args = ["--dropout=0.1", "--std_momentum=0.5", "--kl_share=0.5", "--noise_share=0.5"]
    assert removal(*args, "--out_dir=out/whole").code == 0
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    cut = removal(*args)
    assert cut.code == 128 + signal.SIGTERM
    assert "--init_from=resume" in cut.text
    assert not os.path.exists("out/run/model")

    assert removal(*args, "--init_from=resume").code == 0
    assert Path(MODEL).read_bytes() == Path("out/whole/model/model.safetensors").read_bytes()
    assert log_without_speed("out/run") == log_without_speed("out/whole")
    assert read_json("out/run/settings.json")["init_from"] == TINY  # eval.py's original, not `resume`


def test_the_log_has_every_term_of_the_objective_by_its_name(run, stdlib):
    """In float32, before any event, the model is its own teacher; then it leaves it."""
    terms = ["--kl_share=0.5", "--aux_loss_weight=0.1", "--learning_rate=1e-3", "--dtype=float32", "--max_iters=4"]
    assert run("train.py", *SHORT, *terms, "--ln_schedule=[('ln_2', 3, 0)]").code == 0
    kl = read_log("out/run", "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert 1e-4 < kl[2] < kl[3]  # at step 3 the four ln_2 go
    # the spread of the first step, on the same windows by hand
    std = std_before(GPT.from_pretrained(TINY), "ln_f", windows_of(0))
    each = [(part - part[:, 1:].mean()).square().mean().item() for part in std.split(2)]  # two micro-batches
    assert read_log(key="spread")[0] == pytest.approx(np.mean(each), rel=1e-4)


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(removal, at_step):
    """A kill at step 10 leaves a checkpoint of step 8, and a log that goes further, with half a line at its end."""
    assert removal("--checkpoint_interval=8").code == 0
    whole = Path(MODEL).read_bytes()

    def kill():
        raise KeyboardInterrupt

    at_step(10, kill)
    with pytest.raises(KeyboardInterrupt):
        removal("--checkpoint_interval=8", "--force")
    with open("out/run/log.jsonl", "a") as f:
        f.write('{"step": 11, "lo')
    assert removal("--checkpoint_interval=8", "--init_from=resume").code == 0
    assert Path(MODEL).read_bytes() == whole
    assert [entry["step"] for entry in read_log() if "loss" in entry] == list(range(12))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    checkpoint.write(path, {"step": 1})
    os.symlink("/dev/full", unfinished(path))
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write(path, {"step": 2, "model": torch.zeros(1000)})
    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_the_models_flops_are_its_matrix_products():
    model = GPT.from_pretrained(TINY)
    c = model.config
    weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd  # biases and LNs are 1 % more
    expected = 6 * weights + 12 * c.n_layer * c.n_embd * 32
    assert flops_per_token(model, 32) == pytest.approx(expected, rel=0.02)


def test_wandb_gets_what_the_log_gets(removal, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert "wandb" in removal("--wandb_log").error

    logged, started = [], {}
    wandb = types.SimpleNamespace(init=lambda **settings: started.update(settings),
                                  log=lambda entry, step: logged.append((step, entry)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert removal("--wandb_log", "--wandb_project=mine").code == 0
    assert logged == [(entry["step"], entry) for entry in read_log()]
    assert (started["project"], started["config"]["max_iters"]) == ("mine", 12)
    begun = started["id"]
    assert removal("--wandb_log", "--init_from=resume").code == 0
    assert (started["id"], started["resume"]) == (begun, "allow")
    assert removal("--wandb_log", "--force").code == 0
    assert started["id"] != begun


def test_a_small_model_is_compiled_only_if_a_flag_asks_for_it(run, stdlib, monkeypatch):
    def compile(model):
        raise UserError("it is compiled")

    monkeypatch.setattr(torch, "compile", compile)
    short = [flag for flag in SHORT if flag != "--compile=False"]
    assert run("train.py", *short).code == 0
    assert "compiled" in run("train.py", *short, "--compile", "--force").error
