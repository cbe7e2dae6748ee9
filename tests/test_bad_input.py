"""
Bad input to train.py: one clear line, exit code 1, and nothing half-written.
"""
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY, random_hf, read_json, set_all_fake
from safetensors.torch import load_file, save_file

from model import GPT

RUN = ["train.py", *SHORT, "--max_iters=2"]


@pytest.fixture
def refused(run):
    """refused(args...) is the one line that train.py prints; it writes no run."""

    def runs():
        return set(os.listdir("out")) if os.path.isdir("out") else set()

    def refused(*args):
        before = runs()
        done = run(*RUN, *args)
        assert done.text == done.error
        assert runs() == before
        return done.error

    return refused


def write_meta(**changes):
    meta = dict(vocab_size=257, eot=256, tokenizer="bytes", train=dict(tokens=1000), val=dict(tokens=1000))
    with open("data/mine/meta.json", "w") as f:
        json.dump(meta | changes, f)


@pytest.fixture
def dataset(run):
    """data/mine: 1,000 tokens of vocabulary 257 a split, to be broken."""
    os.makedirs("data/mine")
    for split in ("train", "val"):
        (np.arange(1000) % 250).astype("<u2").tofile(f"data/mine/{split}.bin")
    write_meta()


# --- settings


@pytest.mark.parametrize("args, message", [
    (["--learning_rte=1"], "did you mean learning_rate?"),
    (["--max_iters=ten"], "--max_iters must be int"),
    (["config/missing.py"], "no config file config/missing.py"),
    (["--batch_size=0"], "batch_size is 0"),
    (["--dtype=float16"], "it must be auto, float32 or bfloat16"),
    (["--device=gpu"], "device 'gpu' is not on this machine"),
    (["--device=cpu:x"], "device 'cpu:x' is not on this machine"),
    (["--out_dir="], "out_dir is empty"),
    (["--dataset=mine"], "run `python prepare_owt.py --dataset=mine`"),
    (["--seed=-1"], "seed is -1"),
    ([f"--seed={2**70}"], "and below 9223372036854775808"),
    (["--learning_rate=-1"], "learning_rate is -1.0, but it must be 0 or more"),
    (["--beta2=1"], "beta2 is 1.0"),
    (["--init_from=scratch", "--n_embd=0"], "n_embd is 0, but it must be 1 or more"),
    (["--dropout=1.5"], "dropout is 1.5, but it must be 0 or more, and below 1"),
])
def test_settings(refused, args, message):
    assert message in refused(*args)


def test_compiling_without_a_compiler(refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "compile needs a C++ compiler, and there is none here" in refused("--compile=True")


def test_a_gpus_work_is_not_begun_on_a_cpu_unasked(refused, dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    large = ["--init_from=scratch", "--n_layer=16", "--n_head=8", "--n_embd=512"]
    message = refused("--dataset=mine", *large)
    assert "51 M parameters, and no GPU" in message
    assert "--device=cpu" in message


def test_windows_of_position_0_alone_measure_no_constant(refused, dataset):
    schedule = "--ln_schedule=[('ln_2', 1, 0)]"
    assert "block_size 1 has position 0 alone" in refused("--dataset=mine", "--block_size=1", schedule)


def test_an_out_dir_that_can_not_be_written(refused, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run" in refused("--dataset=mine", "--out_dir=file/run")


@pytest.mark.parametrize("schedule, message", [
    ("[('ln_9', 1, 1)]", "unknown kind 'ln_9'"),
    ("[('ln_2', 1, 1)]", "h.3.ln_2 at step 4 never happens: max_iters is 2"),
    ("[3]", "3 is not a row"),
])
def test_a_schedule_that_can_not_run(refused, dataset, schedule, message):
    assert message in refused("--dataset=mine", f"--ln_schedule={schedule}")


# --- data


@pytest.mark.parametrize("content, message", [
    (b"", "train.bin is empty"),
    (b"abc", "an odd number"),
    (bytes(1998), "has 999 tokens, but meta.json says 1000"),
    (np.full(1000, 400, "<u2").tobytes(), "holds the id 400 at token 0, but its vocabulary has 257"),
    (None, "train.bin is not there"),
])
def test_a_broken_token_file(refused, dataset, content, message):
    os.remove("data/mine/train.bin")
    if content is not None:
        with open("data/mine/train.bin", "wb") as f:
            f.write(content)
    assert message in refused("--dataset=mine")


def test_data_that_do_not_fit_the_model_or_the_window(refused, dataset):
    message = "block_size 512 is beyond the model's 256 positions"
    assert message in refused("--dataset=mine", "--block_size=512")
    write_meta(vocab_size=50257)
    assert "holds token ids up to 50256" in refused("--dataset=mine")
    with open("data/mine/meta.json", "w") as f:
        f.write("{}")
    assert "meta.json: vocab_size is missing" in refused("--dataset=mine")
    write_meta(train=dict(tokens=30))
    np.zeros(30, "<u2").tofile("data/mine/train.bin")
    assert "fewer than block_size + 1 = 33" in refused("--dataset=mine")


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_data(refused, dataset):
    """What can't be read, as without permission (which root has, in a container)."""
    os.remove("data/mine/meta.json")
    os.mkdir("data/mine/meta.json")
    assert "can't read data/mine/meta.json: Is a directory" in refused("--dataset=mine")
    shutil.rmtree("data")
    open("data", "w").close()
    assert "can't read data/mine/meta.json: Not a directory" in refused("--dataset=mine")


# --- what a run left


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def write_nonsense(path):
    with open(path, "w") as f:
        f.write("not a checkpoint")


def save_the_weights_alone(path):
    torch.save({"model": {}}, path)


def save_an_object(path):
    """Reading it would run code."""
    torch.save(torch.nn.Linear(1, 1), path)


@pytest.mark.parametrize("damage, message", [
    (cut_in_half, "can't be read, cut short, damaged or not plain tensors"),
    (write_nonsense, "can't be read, cut short, damaged or not plain tensors"),
    (save_the_weights_alone, "model_config is missing: it is no checkpoint of train.py"),
    (save_an_object, "can't be read, cut short, damaged or not plain tensors"),
    (os.remove, "nothing to resume"),
])
def test_a_checkpoint_that_is_not_one(refused, run, dataset, damage, message):
    assert run(*RUN, "--dataset=mine").code == 0
    damage("out/run/ckpt.pt")
    assert message in refused("--dataset=mine", "--init_from=resume")


def test_a_log_that_is_not_one_and_a_checkpoint_beyond_the_last_step(refused, run, dataset):
    assert run(*RUN, "--dataset=mine").code == 0
    resume = ["--dataset=mine", "--init_from=resume"]
    assert "is at step 2, beyond max_iters 1" in refused(*resume, "--max_iters=1")
    for line in ("garbage", "[1]", "{}"):
        with open("out/run/log.jsonl", "w") as f:
            f.write(line + "\n")
        message = refused(*resume, "--max_iters=3")
        assert "out/run/log.jsonl, line 1" in message
        assert "it is not a log of train.py" in message
    os.remove("out/run/log.jsonl")
    os.mkdir("out/run/log.jsonl")
    assert "can't read out/run/log.jsonl: Is a directory" in refused(*resume, "--max_iters=3")
    assert "can't replace out/run/log.jsonl: Is a directory" in refused("--dataset=mine", "--force")


def test_a_full_disk_while_saving_keeps_the_checkpoint_that_is_there(run, dataset, tmp_path):
    checkpoint = tmp_path / "out/run/ckpt.pt"
    assert run(*RUN, "--dataset=mine").code == 0
    before = checkpoint.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    full = run(*RUN, "--dataset=mine", "--init_from=resume", "--max_iters=4")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)
    assert "can't save out/run/ckpt.pt" in full.error
    assert "File too large" in full.error
    assert checkpoint.read_bytes() == before
    assert not os.path.lexists("out/run/ckpt.pt.tmp")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(run, dataset):
    rate = ["--learning_rate=1e30", "--warmup_iters=1", "--grad_clip=0"]
    done = run(*RUN, "--dataset=mine", "--max_iters=50", *rate)
    assert "the loss is nan and the gradient's norm nan, not finite for 6 steps in a row" in done.error
    assert "There is no checkpoint yet" in done.error
    assert not os.path.exists("out/run/ckpt.pt")


# --- model directories


def config(**changes):
    """Damage to a model directory: other values in its config.json."""

    def damage(folder):
        config = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def config_text(text):
    def damage(folder):
        (folder / "config.json").write_text(text)

    return damage


def without(name):
    def damage(folder):
        os.remove(folder / name)

    return damage


def tensor(name, value):
    """Another tensor in model.safetensors; None: none of this name."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = value
        if value is None:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def weights_cut_short(folder):
    os.truncate(folder / "model.safetensors", 1000)


def weights_that_are_a_folder(folder):
    os.remove(folder / "model.safetensors")
    os.mkdir(folder / "model.safetensors")


def moved_below(folder):
    """The directory of a model becomes that of a run."""
    os.rename(folder, folder.parent / "moved")
    os.mkdir(folder)
    os.rename(folder.parent / "moved", folder / "model")


@pytest.mark.parametrize("damage, message", [
    (
        tensor("transformer.h.1.ln_2.bias", None),
        "the tensor transformer.h.1.ln_2.bias is missing",
    ),
    (
        tensor("transformer.wte.weight", torch.zeros(9, 64)),
        "transformer.wte.weight has shape (9, 64), but config.json makes it (300, 64)",
    ),
    (
        tensor("transformer.h.0.extra", torch.zeros(1)),
        "the tensor transformer.h.0.extra is not one of GPT-2's",
    ),
    (weights_cut_short, "cut short or not safetensors"),
    (weights_that_are_a_folder, "it has no model.safetensors"),
    (without("model.safetensors"), "has no model.safetensors"),
    (without("config.json"), "has no config.json"),
    (config_text("{"), "is not JSON"),
    (config_text("[]"), "holds a list of 0, not an object"),
    (config(model_type="llama"), "model_type is 'llama', but only GPT-2 models can be read"),
    (config(model_type="gpt2_ln_mode"), "ln_state is not whole"),
    (config(activation_function="relu"), "activation_function is 'relu'"),
    (config(n_layer="3"), "n_layer is '3', not an integer from 1 to 2147483647"),
    (config(layer_norm_epsilon="small"), "layer_norm_epsilon is 'small', not a number"),
    (config(layer_norm_epsilon=-1), "layer_norm_epsilon is -1"),
    (config(n_head=7), "n_embd 64 is not a multiple of n_head 7"),
    (config(tie_word_embeddings=False), "tie_word_embeddings is False"),
    (shutil.rmtree, "hf is not a directory here, and https://huggingface.co can't be asked ("),
    (moved_below, "a run's model is hf/model"),
])
def test_a_model_directory_that_is_not_one(refused, dataset, tmp_path, damage, message):
    random_hf().save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf")
    assert message in refused("--dataset=mine", "--init_from=hf")


def save_ln_free(folder):
    model = set_all_fake(GPT.from_pretrained(TINY))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("constant", [float("nan"), -1.0, 0.0, float("inf"), "1"])
def test_a_constant_that_is_none(refused, dataset, constant):
    save_ln_free("free")
    changed = read_json("free/config.json")
    changed["ln_state"]["sites"]["h.2.ln_1v"]["avg_std"] = constant
    with open("free/config.json", "w") as f:
        json.dump(changed, f)
    assert "free/config.json: ln_state is not whole" in refused("--dataset=mine", "--init_from=free")


def test_removal_from_a_folded_model_is_refused_and_fine_tuning_an_ln_free_one_is_not(refused, run, dataset):
    save_ln_free("free").fold().save_pretrained("folded")
    schedule = "--ln_schedule=[('ln_2', 1, 0)]"
    message = "init_from is a folded model: it has no LayerNorm"
    assert message in refused("--dataset=mine", "--init_from=folded", schedule)
    message = "h.0.ln_1qk is fake at step 0, but by ln_schedule it should be real"
    assert message in refused("--dataset=mine", "--init_from=free", schedule)
    for source in ("free", "folded"):
        assert run(*RUN, f"--init_from={source}", "--dataset=mine", f"--out_dir=out/{source}").code == 0
        assert GPT.from_pretrained(f"out/{source}/model").ln_free()


@pytest.mark.parametrize("flags, message", [
    (["--kl_share=1", "--init_from=scratch", "--n_layer=1"], "kl_share needs a model to learn from"),
    (["--kl_share=1", "--teacher=short"], "block_size 32 is beyond the 16 positions of short"),
    (["--kl_share=1", "--teacher=folded"], "teacher folded is folded: name the model with LN"),
    (["--kl_share=1", "--teacher=nowhere/at/all"], "there is no directory nowhere/at/all"),
    (["--kl_share=-1"], "kl_share is -1.0, but it must be 0 or more, and at most 1"),
    (["--kl_share=1.5"], "kl_share is 1.5, but it must be 0 or more, and at most 1"),
    (["--kl_share=1", "--teacher=other"], "teacher other has a vocabulary of 300, and the model one of 320"),
])
def test_a_teacher_that_can_not_teach_is_refused(run, stdlib, flags, message):
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=16).save_pretrained("short")
    set_all_fake(GPT.from_pretrained(TINY)).fold().save_pretrained("folded")
    assert message in run("train.py", *SHORT, *flags).error
