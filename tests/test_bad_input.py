"""
Bad input to train.py: one line that names it, exit code 1, and nothing half-written.
"""
import json
import os
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY, random_hf, read_json, set_all_fake, write_dataset
from safetensors.torch import load_file, save_file

from model import GPT

RUN = ["train.py", *SHORT, "--max_iters=2", "--dataset=mine"]


@pytest.fixture
def refused(run):
    """refused(args...) is the one line that train.py prints; it writes no run. data/mine is there."""
    write_dataset()

    def runs():
        return set(os.listdir("out")) if os.path.isdir("out") else set()

    def refused(*args):
        before = runs()
        done = run(*RUN, *args)
        assert done.text == done.error
        assert runs() == before
        return done.error

    return refused


# --- settings


@pytest.mark.parametrize("args, names", [
    (["--device=gpu"], "device 'gpu'"),
    (["--device=cpu:x"], "device 'cpu:x'"),
    (["--out_dir="], "out_dir"),
    (["--dataset=none"], "python prepare_owt.py --dataset=none"),
    (["--dataset=../mine"], "../mine"),
    (["--block_size=512"], "--block_size=256"),
    (["--block_size=1", "--ln_schedule=[('ln_2', 1, 0)]"], "block_size 1"),
    (["--init_from=scratch", "--n_embd=10", "--n_head=4"], "n_embd 10"),
    (["--init_from=nowhere/at/all"], "nowhere/at/all"),
    (["--ln_schedule=[3]"], "ln_schedule: 3"),
    (["--ln_schedule=[('ln_2', 1, 1)]"], "h.3.ln_2 at step 4"),
])
def test_settings_that_can_not_run_are_named(refused, args, names):
    assert names in refused(*args)


@pytest.mark.parametrize("flags, names", [
    (["--init_from=scratch", "--n_layer=1"], "--teacher"),
    (["--teacher=short"], "teacher short"),
    (["--teacher=folded"], "teacher folded"),
    (["--teacher=free"], "teacher free"),
    (["--teacher=nowhere/at/all"], "nowhere/at/all"),
    (["--teacher=other"], "teacher other"),
])
def test_a_teacher_that_can_not_teach_is_named(refused, flags, names):
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=16).save_pretrained("short")
    free = set_all_fake(GPT.from_pretrained(TINY))
    free.save_pretrained("free")
    free.fold().save_pretrained("folded")
    assert names in refused("--kl_share=1", *flags)


def test_compiling_without_a_compiler_is_refused_before_the_run(refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "--compile=False" in refused("--compile=True")


def test_a_gpus_work_is_not_begun_on_a_cpu_unasked(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    error = refused("--init_from=scratch", "--n_layer=16", "--n_head=8", "--n_embd=512")
    assert "51 M parameters" in error
    assert "--device=cpu" in error


# --- data


@pytest.mark.parametrize("content", [
    b"",
    b"abc",
    bytes(1998),  # 999 tokens; meta.json says 1,000
    np.full(1000, 300, "<u2").tobytes(),  # an id between the vocabulary and the model's padding
    None,
])
def test_a_broken_token_file_is_named_with_the_command_that_makes_it_anew(refused, content):
    os.remove("data/mine/train.bin")
    if content is not None:
        with open("data/mine/train.bin", "wb") as f:
            f.write(content)
    assert "data/mine/train.bin" in refused()
    assert "python prepare_owt.py --dataset=mine --force" in refused()


def test_data_that_do_not_fit_the_model_or_the_window_are_refused(refused):
    write_dataset(vocab_size=50257)
    assert "50256" in refused()
    write_dataset(train=dict(tokens=30))
    np.zeros(30, "<u2").tofile("data/mine/train.bin")
    assert "block_size + 1 = 33" in refused()


@pytest.mark.parametrize("text", ["{}", "[]", "{", "nonsense", '{"vocab_size": "257", "eot": 256}'])
def test_a_meta_json_that_is_not_one_is_named(refused, text):
    with open("data/mine/meta.json", "w") as f:
        f.write(text)
    assert "data/mine/meta.json" in refused()


def test_a_folder_in_the_place_of_a_file_and_a_file_in_that_of_a_folder_are_named(refused, tmp_path):
    """As what can't be read without permission, which root has."""
    os.remove("data/mine/meta.json")
    os.mkdir("data/mine/meta.json")
    assert "data/mine/meta.json: Is a directory" in refused()
    shutil.rmtree("data/mine")
    write_dataset()
    (tmp_path / "file").write_text("")
    assert "file/run" in refused("--out_dir=file/run")


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


@pytest.mark.parametrize("damage", [cut_in_half, write_nonsense, save_the_weights_alone, save_an_object, os.remove])
def test_a_checkpoint_that_is_not_one_is_named(refused, run, damage):
    assert run(*RUN).code == 0
    damage("out/run/ckpt.pt")
    assert "out/run/ckpt.pt" in refused("--init_from=resume")


def test_a_log_that_is_not_one_is_named_with_its_line(refused, run):
    assert run(*RUN).code == 0
    resume = ["--init_from=resume", "--max_iters=3"]
    for line in ("garbage", "[1]", "{}"):
        with open("out/run/log.jsonl", "w") as f:
            f.write(line + "\n")
        assert "out/run/log.jsonl" in refused(*resume)
    os.remove("out/run/log.jsonl")
    os.mkdir("out/run/log.jsonl")
    assert "out/run/log.jsonl" in refused(*resume)


def test_a_checkpoint_beyond_the_last_step_is_refused(refused, run):
    assert run(*RUN).code == 0
    assert "max_iters 1" in refused("--init_from=resume", "--max_iters=1")


def test_a_full_disk_while_saving_keeps_the_checkpoint_that_is_there(run, tmp_path):
    write_dataset()
    path = tmp_path / "out/run/ckpt.pt"
    assert run(*RUN).code == 0
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    full = run(*RUN, "--init_from=resume", "--max_iters=4")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)
    assert "out/run/ckpt.pt" in full.error
    assert "File too large" in full.error
    assert path.read_bytes() == before
    assert sorted(os.listdir("out/run")) == ["ckpt.pt", "log.jsonl", "settings.json"]


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
    """Another tensor in model.safetensors; None: no tensor of this name."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = value
        if value is None:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut_short(folder):
    os.truncate(folder / "model.safetensors", 1000)


def moved_below(folder):
    """The directory of a model becomes that of a run."""
    os.rename(folder, folder.parent / "moved")
    os.mkdir(folder)
    os.rename(folder.parent / "moved", folder / "model")


def constant(value):
    """A constant that no std can be, of an LN-free model."""

    def damage(folder):
        set_all_fake(GPT.from_pretrained(folder)).save_pretrained(folder)
        changed = read_json(folder / "config.json")
        changed["ln_state"]["sites"]["h.2.ln_1v"]["avg_std"] = value
        (folder / "config.json").write_text(json.dumps(changed))

    return damage


@pytest.mark.parametrize("damage, names", [
    (tensor("transformer.h.1.ln_2.bias", None), "transformer.h.1.ln_2.bias"),
    (tensor("transformer.wte.weight", torch.zeros(9, 64)), "transformer.wte.weight.*(9, 64).*(300, 64)"),
    (tensor("transformer.h.0.extra", torch.zeros(1)), "transformer.h.0.extra"),
    (tensor("lm_head.weight", torch.ones(300, 64)), "lm_head.weight"),  # an unembedding that is not tied
    (cut_short, "hf"),
    (without("model.safetensors"), "model.safetensors"),
    (without("config.json"), "config.json"),
    (config_text("{"), "hf/config.json"),
    (config_text("[]"), "hf/config.json"),
    (config(model_type="llama"), "model_type is 'llama'"),
    (config(model_type="gpt2_ln_mode"), "ln_state"),
    (config(activation_function="relu"), "activation_function is 'relu'"),
    (config(n_layer="three"), "three"),
    (config(n_layer=10**12), "hf"),
    (config(layer_norm_epsilon="small"), "small"),
    (config(n_head=7), "n_head 7"),
    (shutil.rmtree, "hf is not a directory"),
    (moved_below, "hf/model"),
    (constant(float("nan")), "h.2.ln_1v|avg_std|hf"),
    (constant(-1.0), "h.2.ln_1v"),
    (constant(0.0), "h.2.ln_1v"),
])
def test_a_model_directory_that_is_not_one_is_named(refused, tmp_path, damage, names):
    random_hf().save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf")
    pattern = names if "|" in names or ".*" in names else re.escape(names)
    assert re.search(pattern.replace("(", r"\(").replace(")", r"\)") if ".*" in names else pattern,
                     refused("--init_from=hf"))


def test_an_unembedding_that_is_stored_beside_its_equal_embedding_is_taken(run, tmp_path):
    """And one that is stored alone, as transformers takes it."""
    hf = random_hf(vocab_size=320)
    hf.save_pretrained(tmp_path / "hf")
    wte = hf.transformer.wte.weight.detach()
    tensor("lm_head.weight", wte.clone())(tmp_path / "hf")
    for damage in (lambda folder: None, tensor("transformer.wte.weight", None)):
        damage(tmp_path / "hf")
        assert torch.equal(GPT.from_pretrained(tmp_path / "hf").transformer.wte.weight, wte)


def test_removal_from_a_folded_model_is_refused_and_fine_tuning_an_ln_free_one_is_not(refused, run):
    free = set_all_fake(GPT.from_pretrained(TINY))
    free.save_pretrained("free")
    free.fold().save_pretrained("folded")
    schedule = "--ln_schedule=[('ln_2', 1, 0)]"
    assert "folded" in refused("--init_from=folded", schedule)
    assert "h.0.ln_1qk" in refused("--init_from=free", schedule)
    for source in ("free", "folded"):
        assert run(*RUN, f"--init_from={source}", f"--out_dir=out/{source}").code == 0
        assert GPT.from_pretrained(f"out/{source}/model").ln_free()
