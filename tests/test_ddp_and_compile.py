"""torchrun with two processes (gloo), and torch.compile: the same run, and the same evaluation, as with one process, eager."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY, random_hf
from test_train import SCHEDULE, SHORT, read_log

from model import GPT, GPTConfig


def losses(folder):
    return [e["loss"] for e in read_log(folder) if "loss" in e]


@pytest.fixture
def torchrun(stdlib):
    def torchrun(*args, script="train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", os.path.join(REPO, script)]
        return subprocess.run([*command, *(SHORT if script == "train.py" else ()), "--dtype=float32", *args], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100)

    return torchrun


def test_two_processes_see_the_same_run_as_one(run, torchrun):
    schedule = f"--ln_schedule={SCHEDULE}"
    done = torchrun(schedule, "--out_dir=out/two", "--eval_interval=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step      0  loss") == 1  # rank 0 alone prints
    assert run("train.py", *SHORT, "--dtype=float32", schedule, "--out_dir=out/one", "--eval_interval=5").code == 0
    assert losses("out/two") == pytest.approx(losses("out/one"), rel=1e-5)
    pick = lambda folder, key: [e[key] for e in read_log(folder) if key in e]
    for key in ("val_loss", "avg_std", "bos_std"):
        assert pick("out/two", key) == pytest.approx(pick("out/one", key), rel=1e-5)


def test_a_run_of_two_processes_is_resumed_by_one(run, torchrun):
    schedule = f"--ln_schedule={SCHEDULE[:-2] + [('eot', 10, None), ('bos', 13, None)]}"
    assert torchrun(schedule, "--max_iters=14", "--eval_interval=7", "--out_dir=out/two").returncode == 0
    one = ["train.py", *SHORT, "--dtype=float32", schedule, "--max_iters=14", "--out_dir=out/two"]
    assert run(*one, "--max_iters=16", "--init_from=resume").code == 0
    assert run(*one, "--max_iters=16", "--out_dir=out/one").code == 0
    assert losses("out/two") == pytest.approx(losses("out/one"), rel=1e-4)
    assert run("eval.py", "--models=out/one,out/two", "--tokens=10240", "--json=result.json").code == 0
    one, two = json.load(open("result.json"))["rows"]
    assert one["role"] == two["role"] == "ln_free" and two["loss"] == pytest.approx(one["loss"], abs=0.002)


def test_two_processes_evaluate_to_the_same_numbers_as_one(run, torchrun):
    """Windows and examples that two don't divide evenly; cross-entropy, faithfulness, HellaSwag and the residual stream."""
    os.makedirs("data_own/hellaswag")
    for name in os.listdir("data"):
        os.symlink(os.path.realpath(f"data/{name}"), f"data_own/{name}")
    os.remove("data")
    os.rename("data_own", "data")
    with open(os.path.join(REPO, "tests", "hellaswag_42.jsonl")) as f, open("data/hellaswag/hellaswag_val.jsonl", "w") as g:
        g.writelines(list(f)[:7])
    random_hf(vocab_size=320, n_positions=256).save_pretrained("other")
    args = [f"--models={TINY},other", "--dataset=stdlib,hellaswag,residual", "--tokens=1300", "--block_size=100", "--batch_size=2"]
    done = torchrun(*args, "--json=two.json", script="eval.py")
    assert done.returncode == 0 and done.stdout.count("hellaswag: share of right endings") == 1, done.stderr
    assert run("eval.py", *args, "--json=one.json").code == 0
    flat = lambda value: [x for v in value.values() for x in flat(v)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    rows = [json.load(open(path))["rows"] for path in ("one.json", "two.json")]
    assert len(rows[0]) == 6
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for x, y in zip(flat(a), flat(b), strict=True):
            assert x == y if x is None or isinstance(x, str) else y == pytest.approx(x, rel=1e-4, abs=1e-6)


def test_what_all_processes_meet_is_said_once(torchrun):
    for args, message in (
        (["--max_itrs=3"], "did you mean max_iters?"),
        (["--dataset=nothing"], "run `python prepare_owt.py --dataset=nothing`"),
        (["--gradient_accumulation_steps=6", "--batch_size=1"], None),
        (["--gradient_accumulation_steps=9"], "gradient_accumulation_steps 9 is not a multiple of 2 processes: it can be run by 1, 3, 9"),
    ):
        done = torchrun(*args, "--max_iters=1")
        assert (done.returncode == 0) == (message is None)
        assert message is None or (done.stdout + done.stderr).count(message) == 1


def test_sigterm_stops_all_processes_at_one_step(torchrun, tmp_path):
    """torchrun hands SIGTERM on to both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", os.path.join(REPO, "train.py")]
    process = subprocess.Popen([*command, *SHORT, "--max_iters=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if "step      5  loss" in line:
            process.terminate()
            break
    text = process.stdout.read()
    process.wait()
    process.stderr.close()
    assert "stopped at step" in text and "--init_from=resume" in text
    assert torch.load("out/run/ckpt.pt", weights_only=True)["step"] > 5


def test_compiled_through_every_event_is_the_eager_run(run, stdlib):
    """float32; and the number of graphs stays small."""
    from torch._dynamo.utils import counters

    schedule = f"--ln_schedule={SCHEDULE}"
    assert run("train.py", *SHORT, "--dtype=float32", schedule, "--out_dir=out/eager").code == 0
    torch.compiler.reset()
    counters.clear()
    assert run("train.py", *SHORT, "--dtype=float32", schedule, "--out_dir=out/compiled", "--compile=True").code == 0
    assert losses("out/compiled") == pytest.approx(losses("out/eager"), rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 4  # the blocks and a piece of the loss, in training and in evaluation


def test_the_number_of_graphs_does_not_grow_with_layers_or_events(run, stdlib, tmp_path):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=6, n_head=2, n_embd=32, eot=256)).save_pretrained(tmp_path / "six")
    schedule = [("ln_2", 1, 1), ("ln_1qk", 7, 1), ("ln_1v", 13, 1), ("ln_f", 19, None), ("eot", 20, None), ("bos", 21, None)]
    torch.compiler.reset()
    counters.clear()
    done = run("train.py", *SHORT, "--init_from=six", "--max_iters=23", "--eval_interval=4", f"--ln_schedule={schedule}", "--compile=True", "--aux_loss_weight=0.1")
    assert done.code == 0 and sum("event" in e for e in read_log()) == 21, done.text
    assert counters["stats"]["unique_graphs"] == 4


def test_gpt2_smalls_shape_goes_through_three_events(run, stdlib, tmp_path):
    """Random weights of the exact shape, vocabulary and all, from a local directory; eager and compiled."""
    random_hf(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024).save_pretrained(tmp_path / "small")
    schedule = [("ln_2", 1, 0), ("ln_1qk", 1, 0), ("ln_f", 2, None)]
    for compile in (False, True):
        done = run("train.py", "--init_from=small", "--max_iters=3", "--batch_size=1", "--block_size=64", "--eval_iters=1", "--dtype=float32", "--learning_rate=1e-4",
                   f"--ln_schedule={schedule}", f"--compile={compile}", f"--out_dir=out/{compile}")
        assert done.code == 0, done.text
        os.remove(f"out/{compile}/ckpt.pt")  # 1.5 GB
    assert all(0 < loss < 100 for loss in losses("out/True")) and len(losses("out/True")) == 3
    assert losses("out/True") == pytest.approx(losses("out/False"), abs=1e-3)
