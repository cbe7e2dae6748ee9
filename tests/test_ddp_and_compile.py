"""
torchrun with two processes (gloo), and torch.compile: the same run and evaluation as with one process, eager.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch
from conftest import REPO, SCHEDULE, SHORT, SMALL, TINY, random_hf, read_json, read_log, run_alone

from model import GPT, GPTConfig

TWO = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # in each of the two processes


@pytest.fixture
def torchrun(stdlib):
    """torchrun("--max_iters=3"): the short run of train.py, or another script, in two processes."""

    def torchrun(*args, script="train.py"):
        short = SHORT if script == "train.py" else []
        return run_alone(script, *short, "--dtype=float32", *args, launcher=TWO, env=ONE_THREAD, timeout=200)

    return torchrun


@pytest.mark.parametrize("losses", [
    ["--kl_share=0.5", "--hidden_weight=1", "--noise_share=0.5", "--aux_loss_weight=0.1"],
    pytest.param(["--kl_share=0.5", "--hidden_weight=1", "--compile=True"], marks=pytest.mark.slow),
])
def test_two_processes_see_the_same_run_as_one(run, torchrun, losses):
    args = [f"--ln_schedule={SCHEDULE}", "--eval_interval=5", *losses]
    two = torchrun(*args, "--out_dir=out/two")
    assert two.code == 0, two.text
    assert two.text.count("step      0  loss") == 1  # rank 0 alone prints
    assert run("train.py", *SHORT, "--dtype=float32", *args, "--out_dir=out/one").code == 0
    for key in ("loss", "val_loss", "avg_std", "bos_std"):
        close = 1e-3 if "--compile=True" in losses else 1e-5
        assert read_log("out/two", key) == pytest.approx(read_log("out/one", key), rel=close)


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_one(run, torchrun):
    schedule = f"--ln_schedule={SCHEDULE[:-1] + [('bos', 13, None)]}"
    assert torchrun(schedule, "--max_iters=14", "--checkpoint_interval=7", "--out_dir=out/two").code == 0
    args = ["train.py", *SHORT, "--dtype=float32", schedule, "--max_iters=16"]
    assert run(*args, "--out_dir=out/two", "--init_from=resume").code == 0
    assert run(*args, "--out_dir=out/one").code == 0
    assert read_log("out/two", "loss") == pytest.approx(read_log("out/one", "loss"), rel=1e-4)
    assert read_log("out/two", "val_loss")[-1] == pytest.approx(read_log("out/one", "val_loss")[-1], abs=0.002)


SLURM = {  # stand-ins for its commands: srun starts both nodes here
    "srun": """trap 'kill -USR1 $a $b' USR1
"$@" & a=$!
"$@" & b=$!
wait $a; wait $a; wait $b; wait $b""",
    "scontrol": '[ "$1" = requeue ] && touch requeued || echo localhost',
}


@pytest.mark.slow
def test_the_batch_script_saves_in_time_and_continues_on_two_nodes(run, stdlib, tmp_path):
    for name, lines in SLURM.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + lines)
        (tmp_path / name).chmod(0o755)
    os.symlink(os.path.join(REPO, "train.py"), "train.py")
    env = os.environ | ONE_THREAD | dict(SLURM_JOB_NODELIST="a,b", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1",
                                         SLURM_JOB_ID="7", PORT="29617")
    env["PATH"] = f"{tmp_path}:{os.path.dirname(sys.executable)}:{env['PATH']}"
    args = [*SHORT, f"--ln_schedule={SCHEDULE}", "--dtype=float32"]
    script = ["bash", os.path.join(REPO, "docs/slurm.sbatch"), *args, "--max_iters=80", "--out_dir=out/two"]
    with subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout:
            if line.startswith("step     20  loss"):
                job.send_signal(signal.SIGUSR1)
    assert os.path.exists("requeued")
    assert not os.path.exists("out/two/model")
    os.remove("requeued")
    assert subprocess.run(script, env=env).returncode == 0
    assert not os.path.exists("requeued")
    assert run("train.py", *args, "--max_iters=80", "--out_dir=out/one").code == 0
    assert read_log("out/two", "loss") == pytest.approx(read_log("out/one", "loss"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_evaluate_to_the_same_numbers_as_one(run, torchrun, stdlib_data):
    """Windows and examples that two don't divide evenly; cross-entropy, faithfulness, HellaSwag and the residual
    stream."""
    os.remove("data")
    os.makedirs("data/hellaswag")
    os.symlink(os.path.join(stdlib_data, "stdlib"), "data/stdlib")
    examples = Path(REPO, "tests/hellaswag_42.jsonl").read_text().splitlines(keepends=True)
    Path("data/hellaswag/hellaswag_val.jsonl").write_text("".join(examples[:7]))
    random_hf(vocab_size=320, n_positions=256).save_pretrained("other")

    args = [f"--models={TINY},other", "--dataset=stdlib,hellaswag,residual"]
    args += ["--tokens=1300", "--block_size=100", "--batch_size=2"]
    done = torchrun(*args, "--json=two.json", script="eval.py")
    assert done.code == 0, done.text
    assert run("eval.py", *args, "--json=one.json").code == 0
    near = json.loads(Path("one.json").read_text(),
                      parse_float=lambda number: pytest.approx(float(number), rel=1e-4, abs=1e-6))
    assert len(near["rows"]) == 6
    assert read_json("two.json")["rows"] == near["rows"]


@pytest.mark.slow
def test_what_all_processes_meet_is_said_once(torchrun):
    done = torchrun("--gradient_accumulation_steps=9", "--max_iters=1")
    assert done.code != 0
    first, _, torchruns = done.text.partition("torch/distributed/elastic")
    assert first.count("gradient_accumulation_steps 9") == first.count("error: ") == 1
    assert "Traceback" not in first
    assert "gradient_accumulation_steps 9" in torchruns.splitlines()[-2]  # its last words, below its own traceback


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_one_step(torchrun):
    """torchrun hands SIGTERM on to both."""
    command = [sys.executable, *TWO, os.path.join(REPO, "train.py"), *SHORT, "--max_iters=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env=os.environ | ONE_THREAD)
    soak.wait_for(process, "step      5  loss")
    process.terminate()
    text = process.communicate()[0]
    assert "--init_from=resume" in text
    assert torch.load("out/run/ckpt.pt", weights_only=True)["step"] > 5


@pytest.mark.slow
def test_the_number_of_graphs_does_not_grow_with_layers_or_events_and_the_losses_are_the_eager_ones(run, stdlib):
    from torch._dynamo.utils import counters

    GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=6, n_head=2, n_embd=32, eot=256)).save_pretrained("six")
    rows = [("ln_2", 1, 1), ("ln_1qk", 7, 1), ("ln_1v", 13, 1), ("ln_f", 19, None), ("eot", 20, None),
            ("bos", 21, None)]
    args = ["train.py", *SHORT, "--init_from=six", "--max_iters=23", "--eval_interval=4", "--dtype=float32",
            "--kl_share=0.5", "--hidden_weight=1", "--aux_loss_weight=0.1", f"--ln_schedule={rows}"]
    assert run(*args, "--out_dir=out/eager").code == 0
    torch.compiler.reset()
    counters.clear()
    assert run(*args, "--out_dir=out/compiled", "--compile=True").code == 0
    # the blocks, and a piece of the loss, in training and in evaluation; the teacher
    assert counters["stats"]["unique_graphs"] == 5
    assert len(read_log("out/compiled", "event")) == 21
    assert read_log("out/compiled", "loss") == pytest.approx(read_log("out/eager", "loss"), rel=1e-3)


@pytest.mark.slow
def test_gpt2_smalls_shape_goes_through_three_events(run, stdlib):
    """Random weights of the exact shape, vocabulary and all, from a local directory; eager and compiled."""
    random_hf(**SMALL).save_pretrained("small")
    rows = [("ln_2", 1, 0), ("ln_1qk", 1, 0), ("ln_f", 2, None)]
    args = ["--init_from=small", "--any_tokenizer", "--device=cpu", "--max_iters=3", "--batch_size=1",
            "--block_size=64", "--eval_iters=1", "--dtype=float32", "--learning_rate=1e-4", f"--ln_schedule={rows}"]
    for compile in (False, True):
        done = run("train.py", *args, f"--compile={compile}", f"--out_dir=out/{compile}")
        assert done.code == 0, done.text
        os.remove(f"out/{compile}/ckpt.pt")  # 1.5 GB
    assert read_log("out/True", "loss") == pytest.approx(read_log("out/False", "loss"), abs=1e-3)
