"""train.py: the schedule as data, the data order, the loop, its checkpoints and its interruptions."""
import importlib.machinery
import json
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from configurator import configure
from conftest import REPO, TINY
from safetensors.torch import load_file

import data
import train
from model import GPT
from train import state_at, timeline

POST = [("ln_2", 200, 20), ("ln_1qk", 440, 20), ("ln_1v", 680, 30), ("ln_f", 1040, None), ("eot", 1060, None), ("bos", 1160, None)]
FOLLOW_UP = [("ln_2", 20, 2), ("ln_1qk", 44, 2), ("ln_1v", 68, 3), ("ln_f", 104, None), ("eot", 106, None), ("bos", 116, None)]

# a removal of 13 LayerNorms and two treatments from the bundled model in 12 steps of 128 tokens
SCHEDULE = [("ln_2", 1, 1), ("ln_1qk", 5, 0), ("ln_1v", 6, 1), ("ln_f", 9, None), ("eot", 10, None), ("bos", 10, None)]
SHORT = [f"--init_from={TINY}", "--max_iters=12", "--batch_size=2", "--gradient_accumulation_steps=2", "--block_size=32", "--warmup_iters=2",
         "--eval_interval=100", "--eval_iters=2", "--log_interval=1", "--compile=False"]


def read_log(folder="out/run"):
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


# --- the schedule


def test_the_posts_schedule_gives_its_events():
    events = timeline(POST, 12, 1200)
    assert events[:12] == [(200 + 20 * i, "ln_2", i) for i in range(12)]
    assert events[12:24] == [(440 + 20 * i, "ln_1qk", i) for i in range(12)]
    assert events[24:36] == [(680 + 30 * i, "ln_1v", i) for i in range(12)]
    assert events[36:] == [(1040, "ln_f", None), (1060, "eot", None), (1160, "bos", None)]
    assert [events[i][0] for i in (11, 23, 35)] == [420, 660, 1010]


def test_the_follow_ups_schedule_gives_its_events():
    events = timeline(FOLLOW_UP, 12, 300)
    assert [k for k, kind, _ in events if kind == "ln_2"] == [20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42]
    assert [k for k, kind, _ in events if kind == "ln_1qk"] == [44, 46, 48, 50, 52, 54, 56, 58, 60, 62, 64, 66]
    assert [k for k, kind, _ in events if kind == "ln_1v"] == [68, 71, 74, 77, 80, 83, 86, 89, 92, 95, 98, 101]
    assert events[36:] == [(104, "ln_f", None), (106, "eot", None), (116, "bos", None)]


def test_gap_0_is_all_layers_at_once_and_empty_is_the_control():
    assert timeline([("ln_2", 3, 0)], 4, 10) == [(3, "ln_2", layer) for layer in range(4)]
    assert timeline([], 4, 10) == []


@pytest.mark.parametrize("row, problem", [
    (("ln_3", 5, 1), "unknown kind 'ln_3'"),
    (("ln_2", 98, 1), "h.3.ln_2 at step 101 never happens: max_iters is 100"),
    (("bos", 100, None), "bos at step 100 never happens"),
    (("ln_2", -1, 2), "must be 0 or more"),
    (("ln_2", 1, None), "steps between layers 0 or more"),
    (("ln_f", 1, 2), "steps between layers None"),
    (("ln_2", 1.5, 2), "must be 0 or more"),
    (("ln_2", 1), "is not a row"),
])
def test_a_schedule_that_can_not_run_is_refused(row, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        timeline([row], 4, 100)
    with pytest.raises(ValueError, match="two rows"):
        timeline([("ln_2", 1, 1), ("ln_2", 50, 1)], 4, 100)


def test_state_is_a_function_of_the_step_and_an_event_comes_before_its_step():
    names = [f"h.{i}.{kind}" for i in range(12) for kind in ("ln_1qk", "ln_1v", "ln_2")] + ["ln_f"]
    events = timeline(POST, 12, 1200)
    fake = lambda step: sum(mode == "fake" for mode in state_at(events, step, names)[0].values())
    assert [fake(k) for k in (0, 200, 201, 421, 441, 1040, 1041, 1200)] == [0, 0, 1, 12, 13, 36, 37, 37]
    assert state_at(events, 1060, names)[1] == {"bos": True, "eot": True}
    assert state_at(events, 1061, names)[1] == {"bos": True, "eot": False}
    assert state_at(events, 1161, names)[1] == {"bos": False, "eot": False}
    assert state_at(timeline([("ln_2", 0, 1)], 12, 100), 0, names)[1] == {"bos": False, "eot": False}  # no row: never on


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_floor():
    """The defaults are the post's: 6e-4 after 100 steps, half way at 1,050, 6e-5 from 2,000."""
    rate = train.learning_rate_at
    assert rate(0) == pytest.approx(6e-4 / 101) and rate(49) == pytest.approx(6e-4 * 50 / 101)
    assert rate(100) == 6e-4 and rate(1050) == pytest.approx((6e-4 + 6e-5) / 2)
    assert rate(2000) == rate(5000) == pytest.approx(6e-5)


# --- the data


def test_the_same_seed_and_step_give_the_same_windows():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = data.train_starts(tokens, 1, 7, 64, 10)
    assert (starts == data.train_starts(tokens, 1, 7, 64, 10)).all()
    assert (starts != data.train_starts(tokens, 1, 8, 64, 10)).any() and (starts != data.train_starts(tokens, 2, 7, 64, 10)).any()
    assert starts.min() >= 0 and starts.max() <= 989
    assert set(data.train_starts(tokens[:12], 0, 0, 200, 10)) == {0, 1}  # both windows that fit, no other


def test_windows_are_inputs_and_the_next_tokens():
    x, y = data.read_windows(np.arange(100, dtype=np.uint16), [3, 50], 4, "cpu")
    assert x.tolist() == [[3, 4, 5, 6], [50, 51, 52, 53]] and y.tolist() == [[4, 5, 6, 7], [51, 52, 53, 54]]


def test_val_windows_are_spread_evenly_and_never_overlap():
    tokens = np.zeros(1001, dtype=np.uint16)
    assert data.val_starts(tokens, 4, 100).tolist() == [0, 250, 500, 750]
    assert data.val_starts(tokens, 50, 100).tolist() == [100 * i for i in range(10)]


# --- a whole run


@pytest.fixture
def removal(run, stdlib):
    return lambda *args: run("train.py", *SHORT, f"--ln_schedule={SCHEDULE}", *args)


def test_a_run_removes_every_layernorm_and_leaves_its_four_files(removal):
    done = removal()
    assert done.code == 0, done.text
    assert sorted(os.listdir("out/run")) == ["ckpt.pt", "log.jsonl", "model", "settings.json"]
    model = GPT.from_pretrained("out/run/model")
    assert model.ln_free() and set(model.ln_modes().values()) == {"fake"}
    x = data.read_windows(np.fromfile("data/stdlib/val.bin", dtype="<u2"), [0, 5000], 256, "cpu")[0]
    with torch.no_grad():
        torch.testing.assert_close(model.eval().fold()(x)[0], model(x)[0], atol=1e-4, rtol=0)
    assert "ln_2   fake before step 1, 2, 3, 4\n" in done.text and done.text.index("ln_2   fake") < done.text.index("step      0")

    log = read_log()
    events = [(e["step"], e["event"]) for e in log if "event" in e]
    assert events == [(1, "h.0.ln_2"), (2, "h.1.ln_2"), (3, "h.2.ln_2"), (4, "h.3.ln_2"), *((5, f"h.{i}.ln_1qk") for i in range(4)),
                      *((6 + i, f"h.{i}.ln_1v") for i in range(4)), (9, "ln_f"), (10, "eot"), (10, "bos")]
    assert [e["step"] for e in log if "loss" in e] == list(range(12))
    constants = {e["event"]: (e["avg_std"], e["bos_std"]) for e in log if "avg_std" in e}
    assert constants == {name: (site.avg_std.item(), site.bos_std.item()) for name, site in model.sites().items()}
    settings = json.load(open("out/run/settings.json"))
    assert settings["max_iters"] == 12 and settings["ln_schedule"] == [list(row) for row in SCHEDULE] and settings["n_embd"] == model.config.n_embd


def test_the_constants_of_an_event_are_those_of_its_batch_and_weights(removal):
    """An event at step 0 meets the bundled model's own weights: measure them here, on the same windows."""
    removal(f"--ln_schedule={[('ln_2', 0, 0), ('ln_f', 11, None)]}", "--dtype=float32")
    tokens = np.fromfile("data/stdlib/train.bin", dtype="<u2")
    starts = data.train_starts(tokens, 1337, 0, 4, 32)
    model = GPT.from_pretrained(TINY)
    model.measure_std(data.read_windows(tokens, starts, 32, "cpu")[0])  # micro-batches in one, as no end-of-text is in them
    for entry in (e for e in read_log() if e.get("event", "").endswith("ln_2")):
        assert entry["avg_std"] == pytest.approx(model.sites()[entry["event"]].avg_std.item(), rel=1e-4)
        assert entry["bos_std"] == pytest.approx(model.sites()[entry["event"]].bos_std.item(), rel=1e-4)


def test_the_control_sees_the_same_batches_and_keeps_its_layernorms(removal):
    assert removal("--ln_schedule=[]", "--out_dir=out/control").code == 0
    assert removal().code == 0
    free, control = ([e["loss"] for e in read_log(folder) if "loss" in e] for folder in ("out/run", "out/control"))
    assert free[0] == control[0] and free[1] != control[1]  # the first event is at step 1
    assert set(GPT.from_pretrained("out/control/model").ln_modes().values()) == {"real"}


def test_gradient_accumulation_is_one_large_batch(removal):
    for steps, size in ((1, 4), (4, 1)):
        removal("--ln_schedule=[]", f"--gradient_accumulation_steps={steps}", f"--batch_size={size}", f"--out_dir=out/{steps}", "--dtype=float32", "--eval_iters=1")
    one, four = ([e["loss"] for e in read_log(f"out/{steps}") if "loss" in e] for steps in (1, 4))
    assert one == pytest.approx(four, rel=1e-4)


def test_evaluation_is_the_mean_loss_of_the_even_windows(removal):
    """Against transformers on the windows by hand."""
    from transformers import AutoModelForCausalLM

    removal("--dtype=float32", "--max_iters=1", "--ln_schedule=[]", "--learning_rate=1e-12", "--min_lr=0")
    tokens = np.fromfile("data/stdlib/val.bin", dtype="<u2").astype(np.int64)
    gap = (len(tokens) - 1) // 4
    windows = torch.stack([torch.from_numpy(tokens[i * gap : i * gap + 33]) for i in range(4)])
    hf = AutoModelForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(hf(windows[:, :-1]).logits.transpose(1, 2), windows[:, 1:])
    assert [e["val_loss"] for e in read_log() if "val_loss" in e][0] == pytest.approx(expected.item(), abs=1e-5)


# --- interruption


@pytest.mark.parametrize("step", [1, 5, 11])
def test_an_interrupted_run_ends_with_the_same_bits(removal, monkeypatch, step):
    """SIGTERM arrives while a step runs: before the first event's, in the midst of them, in the last."""
    whole = removal("--dropout=0.1", "--out_dir=out/whole")
    real_starts, sent = data.train_starts, []

    def starts(tokens, seed, k, *rest):
        if k == step and not sent:
            sent.append(k)
            signal.raise_signal(signal.SIGTERM)
        return real_starts(tokens, seed, k, *rest)

    monkeypatch.setattr(data, "train_starts", starts)
    cut = removal("--dropout=0.1")
    monkeypatch.setattr(data, "train_starts", real_starts)
    assert cut.code == 128 + signal.SIGTERM and "--init_from=resume" in cut.text
    assert not os.path.exists("out/run/model")
    resumed = removal("--dropout=0.1", "--init_from=resume")
    assert whole.code == resumed.code == 0, resumed.text
    for name, p in load_file("out/whole/model/model.safetensors").items():
        assert torch.equal(p, load_file("out/run/model/model.safetensors")[name]), name
    without_speed = lambda log: [{k: v for k, v in e.items() if k not in ("tokens_per_s", "mfu")} for e in log]
    assert without_speed(read_log("out/run")) == without_speed(read_log("out/whole"))
    assert json.load(open("out/run/settings.json"))["init_from"] == TINY  # eval.py's original, not `resume`


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(removal, monkeypatch):
    """What a kill at step 10 leaves: a checkpoint of step 8 and a log that is further, with half a line at its end."""
    removal("--eval_interval=8")
    whole = load_file("out/run/model/model.safetensors")
    real_starts = data.train_starts

    class Killed(BaseException):
        pass

    def starts(tokens, seed, k, *rest):
        if k == 10:
            raise Killed
        return real_starts(tokens, seed, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(data, "train_starts", starts)
        with pytest.raises(Killed):
            removal("--eval_interval=8")
    with open("out/run/log.jsonl", "a") as f:
        f.write('{"step": 11, "lo')
    assert torch.load("out/run/ckpt.pt", weights_only=True)["step"] == 8 and not os.path.exists("out/run/model")
    assert removal("--eval_interval=8", "--init_from=resume").code == 0
    assert all(torch.equal(p, load_file("out/run/model/model.safetensors")[name]) for name, p in whole.items())
    assert [e["step"] for e in read_log() if "loss" in e] == list(range(12))


def test_a_full_disk_leaves_the_old_checkpoint(run, tmp_path):
    path = str(tmp_path / "ckpt.pt")
    train.save_checkpoint(path, {"step": 1})
    os.symlink("/dev/full", path + ".tmp")
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(path, {"step": 2, "model": torch.zeros(1000)})
    assert torch.load(path) == {"step": 1} and os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_resume_under_another_schedule_is_refused(removal):
    removal()
    again = removal("--init_from=resume", "--max_iters=14", "--ln_schedule=[]")
    assert again.code == 1 and "is fake at step 12, but by ln_schedule it should be real" in again.text


# --- the configs, and what is logged


@pytest.mark.parametrize("name, n_layer", [("remove_ln", 12), ("remove_ln_fast", 12), ("remove_ln_medium", 24), ("remove_ln_large", 36), ("remove_ln_xl", 48), ("remove_ln_tiny", 4)])
def test_each_config_removes_all_and_control_keeps_all_else(name, n_layer):
    config, control = (os.path.join(REPO, "config", f"{n}.py") for n in (name, "control"))
    defaults = {k: v for k, v in vars(train).items()}
    removal = configure(dict(defaults), [config], "")
    events = timeline(removal["ln_schedule"], n_layer, removal["max_iters"])
    assert len({event[1:] for event in events}) == 3 * n_layer + 3  # sites, ln_f and the two treatments
    by_kind = {kind: [k for k, name, _ in events if name == kind] for kind in ("ln_2", "ln_1qk", "ln_1v", "ln_f", "eot", "bos")}
    assert [k for steps in by_kind.values() for k in steps] == sorted(k for k, *_ in events)  # each kind waits for the one before
    assert name == "remove_ln_tiny" or removal["batch_size"] * removal["gradient_accumulation_steps"] * removal["block_size"] == 2**19
    kept = configure(dict(defaults), [config, control], "")
    assert {k for k in kept if kept[k] != removal[k]} <= {"ln_schedule", "out_dir", "aux_loss_weight"}
    assert kept["ln_schedule"] == [] and kept["aux_loss_weight"] == 0 and kept["out_dir"] == removal["out_dir"] + "_control"


def test_the_published_schedules_are_in_the_configs():
    read = lambda name: configure({k: v for k, v in vars(train).items()}, [os.path.join(REPO, "config", name)], "")
    assert read("remove_ln.py")["ln_schedule"] == POST and read("remove_ln_fast.py")["ln_schedule"] == FOLLOW_UP


def test_the_models_flops_are_its_matrix_products():
    model = GPT.from_pretrained(TINY)
    c = model.config
    weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd  # the matrices; biases and LNs are 1 % more
    assert train.flops_per_token(model, 32) == pytest.approx(6 * weights + 12 * c.n_layer * c.n_embd * 32, rel=0.02)


def test_wandb_gets_what_the_log_gets(removal, monkeypatch):
    logged, started = [], []
    wandb = types.SimpleNamespace(init=lambda **k: started.append(k), log=lambda entry, step: logged.append(entry))
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert "needs `pip install wandb`" in removal("--wandb_log").text
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert removal("--wandb_log", "--wandb_project=mine").code == 0
    assert logged == read_log() and started[0]["project"] == "mine" and started[0]["config"]["max_iters"] == 12
