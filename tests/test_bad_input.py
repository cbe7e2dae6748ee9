"""
Bad input to train.py: one line that names it, exit code 1, and nothing half-written.
"""
import glob
import json
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY, random_hf, read_json, set_all_fake, write_dataset
from safetensors.torch import load_file, save_file

from model import GPT
from parts.errors import UserError

RUN = ["train.py", *SHORT, "--max_iters=2", "--dataset=mine"]


@pytest.fixture
def refused(run):
    """refused(args...) is the one line that train.py prints; it writes no run. data/mine is there."""
    write_dataset()

    def refused(*args):
        before = glob.glob("out/*")
        done = run(*RUN, *args)
        assert done.text == done.error
        assert glob.glob("out/*") == before
        return done.error

    return refused


# --- settings, data, and what a run left


@pytest.mark.parametrize("flags, names", [
    ("--device=gpu", "device"),
    ("--device=cpu:x", "device"),
    ("--out_dir=", "out_dir"),
    ("--dataset=none", "none"),
    ("--dataset=../mine", "../mine"),
    ("--block_size=512", "block_size"),
    ("--block_size=1 --ln_schedule=[('ln_2',1,0)]", "block_size"),
    ("--init_from=scratch --n_embd=10 --n_head=4", "n_embd"),
    ("--init_from=nowhere/at/all", "nowhere/at/all"),
    ("--ln_schedule=[('ln_2',1,1)]", "h.3.ln_2"),
])
def test_settings_that_can_not_run_are_named(refused, flags, names):
    assert names in refused(*flags.split())


def test_a_teacher_that_can_not_teach_is_named(refused):
    """One of another vocabulary, or of fewer positions."""
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=16).save_pretrained("short")
    for teacher in ("other", "short"):
        assert teacher in refused("--kl_share=1", f"--teacher={teacher}")
    assert "teacher" in refused("--kl_share=1", "--init_from=scratch", "--n_layer=1")
    assert "kl_share" in refused("--teacher=other")


def test_streams_are_compared_with_a_teacher_of_the_same_shape(refused):
    random_hf(vocab_size=320, n_positions=256).save_pretrained("other")
    assert "3 of 64" in refused("--kl_share=0.5", "--hidden_weight=1", "--teacher=other")
    assert "kl_share" in refused("--hidden_weight=1")


def test_noise_without_kl_or_without_room_is_refused(refused):
    assert "kl_share" in refused("--noise_share=0.5")
    assert "batch_size" in refused("--noise_share=0.01", "--kl_share=0.5")


def test_a_machine_that_can_not_do_it_is_said_before_the_run(refused, monkeypatch):
    """No compiler; a GPU's work on a CPU, unasked."""
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert "--compile=False" in refused("--compile=True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device=cpu" in refused("--init_from=scratch", "--n_layer=16", "--n_head=8", "--n_embd=512")


def test_a_broken_token_file_is_named_with_the_command_that_makes_it_anew(refused):
    """Among them 999 tokens, where meta.json says 1,000; an id between the vocabulary and the model's padding."""
    path = Path("data/mine/train.bin")
    for content in (b"", b"abc", bytes(1998), np.full(1000, 300, "<u2").tobytes(), None):
        path.unlink() if content is None else path.write_bytes(content)
        assert re.search("data/mine/train.bin.* --dataset=mine --force", refused())


def test_data_that_do_not_fit_the_model_or_the_window_are_refused(refused):
    write_dataset(vocab_size=50257)
    assert "50256" in refused()
    write_dataset(train=dict(tokens=30))
    np.zeros(30, "<u2").tofile("data/mine/train.bin")
    assert "block_size" in refused()


def test_a_file_or_folder_that_is_not_one_is_named(refused):
    """A folder in a file's place is as what can't be read without permission, which root has."""
    Path("file").write_text("")
    assert "file/run" in refused("--out_dir=file/run")
    meta = Path("data/mine/meta.json")
    for text in ("{}", "[]", "{", '{"vocab_size": "257", "eot": 256}'):
        meta.write_text(text)
        assert "data/mine/meta.json" in refused()
    meta.unlink()
    meta.mkdir()
    assert "data/mine/meta.json" in refused()


def test_a_checkpoint_or_log_that_is_not_one_is_named(refused, run):
    """Reading an object that was saved would run code."""
    assert run(*RUN).code == 0
    path, log = Path("out/run/ckpt.pt"), Path("out/run/log.jsonl")
    whole = path.read_bytes()
    resume = ["--init_from=resume", "--max_iters=3"]
    for damaged in (whole[: len(whole) // 2], b"not a checkpoint", {"model": {}}, torch.nn.Linear(1, 1)):
        path.write_bytes(damaged) if isinstance(damaged, bytes) else torch.save(damaged, path)
        assert "out/run/ckpt.pt" in refused(*resume)
    path.unlink()
    assert "out/run/ckpt.pt" in refused(*resume)
    path.write_bytes(whole)
    assert "max_iters" in refused("--init_from=resume", "--max_iters=1")
    assert "h.0.ln_2" in refused(*resume, "--ln_schedule=[('ln_2', 1, 0)]")  # it is real in the checkpoint
    for line in ("garbage", "[1]", "{}"):
        log.write_text(line + "\n")
        assert "out/run/log.jsonl" in refused(*resume)
    log.unlink()
    log.mkdir()
    assert "out/run/log.jsonl" in refused(*resume)


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
    assert path.read_bytes() == before
    assert sorted(os.listdir("out/run")) == ["ckpt.pt", "log.jsonl", "settings.json"]


# --- model directories


def config(**changes):
    """Damage to a model directory: other values in its config.json."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | changes))


def tensor(name, value):
    """Another tensor in model.safetensors; None: no tensor of this name."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = value
        save_file({key: t for key, t in tensors.items() if t is not None}, folder / "model.safetensors")

    return damage


def constant(folder, value):
    """A constant that no std can be, of an LN-free model."""
    set_all_fake(GPT.from_pretrained(folder)).save_pretrained(folder)
    ln_state = read_json(folder / "config.json")["ln_state"]
    ln_state["sites"]["h.2.ln_1v"]["avg_std"] = value
    config(ln_state=ln_state)(folder)


@pytest.mark.parametrize("damage, names", [
    (tensor("transformer.h.1.ln_2.bias", None), "transformer.h.1.ln_2.bias"),
    (tensor("transformer.wte.weight", torch.zeros(9, 64)), "transformer.wte.weight"),
    (tensor("transformer.h.0.extra", torch.zeros(1)), "transformer.h.0.extra"),
    (tensor("lm_head.weight", torch.ones(300, 64)), "lm_head.weight"),  # an unembedding that is not tied
    (lambda folder: os.truncate(folder / "model.safetensors", 1000), "hf"),
    (lambda folder: os.remove(folder / "config.json"), "config.json"),
    (lambda folder: os.remove(folder / "model.safetensors"), "model.safetensors"),
    (lambda folder: (folder / "config.json").write_text("{"), "hf/config.json"),
    (config(model_type="gpt2_ln_mode"), "ln_state"),
    (config(model_type="llama"), "llama"),
    (config(activation_function="relu"), "relu"),
    (config(n_layer=10**12), "hf"),
    (config(n_head=7), "n_head"),
    (lambda folder: constant(folder, float("nan")), "hf"),
    (lambda folder: constant(folder, 0.0), "h.2.ln_1v"),
])
def test_a_model_directory_that_is_not_one_is_named(tmp_path, damage, names):
    random_hf().save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=names):
        GPT.from_pretrained(str(tmp_path / "hf"))


def test_an_unembedding_that_is_stored_beside_its_equal_embedding_or_alone_is_taken(tmp_path):
    hf = random_hf(vocab_size=320)
    hf.save_pretrained(tmp_path / "hf")
    wte = hf.transformer.wte.weight.detach()
    for damage in (tensor("lm_head.weight", wte.clone()), tensor("transformer.wte.weight", None)):
        damage(tmp_path / "hf")
        assert torch.equal(GPT.from_pretrained(tmp_path / "hf").transformer.wte.weight, wte)


def test_an_ln_free_model_can_not_teach_or_be_removed_from_but_be_fine_tuned(refused, run):
    free = set_all_fake(GPT.from_pretrained(TINY))
    free.save_pretrained("free")
    free.fold().save_pretrained("folded")
    for source, named in (("free", "h.0.ln_1qk"), ("folded", "folded")):
        assert source in refused("--kl_share=1", f"--teacher={source}")
        assert named in refused(f"--init_from={source}", "--ln_schedule=[('ln_2', 1, 0)]")
        assert run(*RUN, f"--init_from={source}", f"--out_dir=out/{source}").code == 0
        assert run(*RUN, "--init_from=resume", f"--out_dir=out/{source}", "--max_iters=3").code == 0
        assert GPT.from_pretrained(f"out/{source}/model").ln_free()
