"""Bad input to train.py: one clear line, a non-zero exit, nothing half-written."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, random_hf, set_all_fake
from safetensors.torch import load_file, save_file

from model import GPT

SHORT = ["--max_iters=2", "--batch_size=2", "--block_size=32", "--eval_iters=1", "--compile=False"]


@pytest.fixture
def refused(run, tmp_path):
    """refused(args...) is the one line that train.py ends with; it must have written no run."""

    def refused(*args):
        before = set(os.listdir("out")) if os.path.isdir("out") else set()
        done = run("train.py", f"--init_from={TINY}", *SHORT, *args)
        assert done.code == 1, done.text
        assert done.text.startswith("error: ") and done.text.count("\n") <= 1 and "Traceback" not in done.text
        assert before == (set(os.listdir("out")) if os.path.isdir("out") else set())
        return done.text

    return refused


@pytest.fixture
def dataset(tmp_path):
    """data/mine: 1,000 tokens of vocabulary 257 a split, to be broken."""
    os.makedirs("data/mine")
    for split in ("train", "val"):
        (np.arange(1000) % 250).astype("<u2").tofile(f"data/mine/{split}.bin")
    with open("data/mine/meta.json", "w") as f:
        json.dump(dict(vocab_size=257, eot=256, tokenizer="bytes", train=dict(tokens=1000), val=dict(tokens=1000)), f)


@pytest.mark.parametrize("args, message", [
    (["--learning_rte=1"], "did you mean learning_rate?"), (["--max_iters=ten"], "--max_iters must be int"),
    (["config/missing.py"], "no config file config/missing.py"), (["--batch_size=0"], "batch_size is 0"),
    (["--dtype=float16"], "it must be auto, float32 or bfloat16"), (["--device=gpu"], "device 'gpu' is not on this machine"),
    (["--dataset=mine"], "run `python prepare_owt.py --dataset=mine`"), (["--seed=-1"], "seed is -1"),
    ([f"--seed={2**70}"], "and below 9223372036854775808"), (["--learning_rate=-1"], "learning_rate is -1.0, but it must be 0 or more"), (["--beta2=1"], "beta2 is 1.0"),
    (["--init_from=scratch", "--n_embd=0"], "n_embd is 0, but it must be 1 or more"), (["--dropout=1.5"], "dropout is 1.5, but it must be 0 or more, and below 1"),
])
def test_settings(refused, args, message):
    assert message in refused(*args)


def test_compiling_without_a_compiler(refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "compile needs a C++ compiler, and there is none here" in refused("--compile=True")


@pytest.mark.parametrize("content, message", [
    (b"", "train.bin is empty"), (b"abc", "an odd number"), (bytes(1998), "has 999 tokens, but meta.json says 1000"),
    (np.full(1000, 400, "<u2").tobytes(), "holds token ids up to 400, but the model's vocabulary has 320"), (None, "train.bin is not there"),
])
def test_a_broken_token_file(refused, dataset, content, message):
    os.remove("data/mine/train.bin")
    if content is not None:
        with open("data/mine/train.bin", "wb") as f:
            f.write(content)
    assert message in refused("--dataset=mine")


def test_data_that_do_not_fit_the_model_or_the_window(refused, dataset):
    assert "block_size 512 is beyond the model's 256 positions" in refused("--dataset=mine", "--block_size=512")
    meta = json.load(open("data/mine/meta.json"))
    json.dump(meta | dict(vocab_size=50257), open("data/mine/meta.json", "w"))
    assert "holds token ids up to 50256" in refused("--dataset=mine")
    json.dump({}, open("data/mine/meta.json", "w"))
    assert "meta.json has no vocab_size, eot, train or val" in refused("--dataset=mine")
    json.dump(meta | dict(train=dict(tokens=30)), open("data/mine/meta.json", "w"))
    np.zeros(30, "<u2").tofile("data/mine/train.bin")
    assert "fewer than block_size + 1 = 33" in refused("--dataset=mine")


@pytest.mark.parametrize("schedule, message", [
    ("[('ln_9', 1, 1)]", "unknown kind 'ln_9'"), ("[('ln_2', 1, 1)]", "h.3.ln_2 at step 4 never happens: max_iters is 2"), ("[3]", "3 is not a row"),
])
def test_a_schedule_that_can_not_run(refused, dataset, schedule, message):
    assert message in refused("--dataset=mine", f"--ln_schedule={schedule}")


def test_an_out_dir_that_can_not_be_written(refused, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run" in refused("--dataset=mine", "--out_dir=file/run")


@pytest.mark.parametrize("damage, message", [
    (lambda path: os.truncate(path, os.path.getsize(path) // 2), "not a whole checkpoint"),
    (lambda path: open(path, "wb").write(b"not a checkpoint"), "not a whole checkpoint"),
    (lambda path: torch.save({"model": {}}, path), "is not a checkpoint of train.py"),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), "not a whole checkpoint"),  # arbitrary code is not run
    (os.remove, "nothing to resume"),
])
def test_a_checkpoint_that_is_not_one(refused, run, dataset, damage, message):
    assert run("train.py", f"--init_from={TINY}", *SHORT, "--dataset=mine").code == 0
    damage("out/run/ckpt.pt")
    assert message in refused("--dataset=mine", "--init_from=resume")


def test_a_log_that_is_not_one_and_a_checkpoint_beyond_the_last_step(refused, run, dataset):
    assert run("train.py", f"--init_from={TINY}", *SHORT, "--dataset=mine").code == 0
    assert "is at step 2, beyond max_iters 1" in refused("--dataset=mine", "--init_from=resume", "--max_iters=1")
    for line in ("garbage", "[1]", "{}"):
        with open("out/run/log.jsonl", "w") as f:
            f.write(line + "\n")
        assert "out/run/log.jsonl is not a log of train.py" in refused("--dataset=mine", "--init_from=resume", "--max_iters=3")


def break_config(**changes):
    def damage(folder):
        config = json.load(open(folder / "config.json"))
        json.dump(config | changes, open(folder / "config.json", "w"))

    return damage


def break_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize("damage, message", [
    (break_tensors(lambda t: t.pop("transformer.h.1.ln_2.bias")), "the tensor transformer.h.1.ln_2.bias is missing"),
    (break_tensors(lambda t: t.update({"transformer.wte.weight": torch.zeros(9, 64)})), "transformer.wte.weight has shape (9, 64), but config.json makes it (300, 64)"),
    (break_tensors(lambda t: t.update({"transformer.h.0.extra": torch.zeros(1)})), "the tensor transformer.h.0.extra is not one of GPT-2's"),
    (break_config(model_type="llama"), "model_type is 'llama', but only GPT-2 models can be read"),
    (break_config(activation_function="relu"), "activation_function is 'relu'"), (break_config(n_layer="3"), "n_layer is missing or not a positive integer"),
    (break_config(layer_norm_epsilon="small"), "layer_norm_epsilon is 'small', not a number"),
    (break_config(n_head=7), "n_embd 64 is not a multiple of n_head 7"), (break_config(tie_word_embeddings=False), "tie_word_embeddings is False"),
    (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cut short or not safetensors"),
    (lambda folder: os.remove(folder / "model.safetensors"), "has no model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "model_type is None"), (lambda folder: os.remove(folder / "config.json"), "has no config.json"),
    (lambda folder: shutil.rmtree(folder), "hf is not a directory here, and https://huggingface.co can't be asked ("),
    (break_config(model_type="gpt2_ln_mode"), "ln_state is not whole"), (break_config(layer_norm_epsilon=-1), "layer_norm_epsilon is -1"),
    (lambda folder: (os.remove(folder / "model.safetensors"), os.mkdir(folder / "model.safetensors")), "model.safetensors can't be read"),
    (lambda folder: os.rename(folder, folder.parent / "model") or os.mkdir(folder) or os.rename(folder.parent / "model", folder / "model"), "a run's model is hf/model"),
])
def test_a_model_directory_that_is_not_one(refused, dataset, tmp_path, damage, message):
    random_hf().save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf")
    assert message in refused("--dataset=mine", "--init_from=hf")


@pytest.mark.parametrize("constant", [float("nan"), -1.0, 0.0, float("inf"), "1"])
def test_a_constant_that_is_none(refused, dataset, tmp_path, constant):
    model = set_all_fake(GPT.from_pretrained(TINY))
    model.save_pretrained(tmp_path / "free")
    config = json.load(open("free/config.json"))
    config["ln_state"]["sites"]["h.2.ln_1v"]["avg_std"] = constant
    json.dump(config, open("free/config.json", "w"))
    assert "free/config.json: ln_state is not whole" in refused("--dataset=mine", "--init_from=free")


def test_a_full_disk_while_saving_keeps_the_checkpoint_that_is_there(run, dataset):
    assert run("train.py", f"--init_from={TINY}", *SHORT, "--dataset=mine").code == 0
    before = open("out/run/ckpt.pt", "rb").read()
    os.symlink("/dev/full", "out/run/ckpt.pt.tmp")
    full = run("train.py", f"--init_from={TINY}", *SHORT, "--dataset=mine")
    assert full.code == 1 and "can't save out/run/ckpt.pt" in full.text and "No space left" in full.text
    assert open("out/run/ckpt.pt", "rb").read() == before and not os.path.lexists("out/run/ckpt.pt.tmp")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(run, dataset):
    done = run("train.py", f"--init_from={TINY}", *SHORT, "--dataset=mine", "--max_iters=50", "--learning_rate=1e30", "--warmup_iters=1", "--grad_clip=0")
    assert done.code == 1 and "the loss is nan at step" in done.text and not os.path.exists("out/run/ckpt.pt")


def test_removal_from_a_folded_model_is_refused_and_fine_tuning_an_ln_free_one_is_not(refused, run, dataset):
    model = set_all_fake(GPT.from_pretrained(TINY))
    model.save_pretrained("free")
    model.fold().save_pretrained("folded")
    schedule = "--ln_schedule=[('ln_2', 1, 0)]"
    assert "folded is folded: it has no LayerNorm" in refused("--dataset=mine", "--init_from=folded", schedule)
    assert "h.0.ln_1qk is fake at step 0, but by ln_schedule it should be real" in refused("--dataset=mine", "--init_from=free", schedule)
    for source in ("free", "folded"):
        assert run("train.py", f"--init_from={source}", *SHORT, "--dataset=mine").code == 0
        assert GPT.from_pretrained("out/run/model").ln_free()
