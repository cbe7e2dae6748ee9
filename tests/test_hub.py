"""
Weights from a hub, a tiny one on 127.0.0.1: fetched once, in all their forms, and each refusal is one line.
"""
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import random_hf
from tiny_hub import COMMIT, point_here, serve

from model import GPT
from parts.errors import UserError

IDX = torch.arange(20)[None]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with org/tiny: a random GPT-2 in transformers' format."""
    monkeypatch.chdir(tmp_path)
    with serve({"org/tiny": tmp_path / "tiny"}) as server:
        point_here(server, monkeypatch, tmp_path / "cache")
        server.hf = random_hf()
        server.hf.save_pretrained("tiny")
        yield server


@torch.no_grad()
def assert_same_logits(hf, source):
    logits = GPT.from_pretrained(source).eval()(IDX)[0]
    torch.testing.assert_close(logits, hf(IDX).logits, atol=1e-4, rtol=0)


def refusal(source):
    """The line that refuses a source."""
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(source)
    return str(caught.value)


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, tmp_path, monkeypatch):
    for source in ("org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}"):
        assert_same_logits(hub.hf, source)
    gets = [file for command, _, file, _ in hub.requests if command == "GET"]
    assert [file for file in gets if file.endswith(".safetensors")] == ["model.safetensors"]
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert_same_logits(hub.hf, "org/tiny")
    os.truncate(cached.resolve(), 1000)  # a file of another size than the hub's is fetched anew
    assert_same_logits(hub.hf, "org/tiny")


def test_all_forms_are_read_and_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    large = random_hf(n_layer=1, n_head=12, n_embd=768)  # 29 MB: huggingface_hub writes 10 MiB at a time
    large.save_pretrained("large")
    hub.cut["model.safetensors"] = 15_000_000
    hub.hf.save_pretrained("sharded", max_shard_size="100KB")
    assert len(list(tmp_path.glob("sharded/*.safetensors"))) > 2
    hub.hf.config.save_pretrained("bin")
    torch.save(hub.hf.state_dict(), "bin/pytorch_model.bin")
    for name, hf in dict(large=large, sharded=hub.hf, bin=hub.hf).items():
        hub.repos[f"org/{name}"] = tmp_path / name
        assert_same_logits(hf, f"org/{name}")
    gets = [(file, part) for command, _, file, part in hub.requests if command == "GET"]
    assert [part for file, part in gets if file == "model.safetensors"] == [None, f"bytes={10 * 2**20}-"]


def test_what_can_not_be_had_is_said_in_one_line(hub, tmp_path, monkeypatch):
    """Reading org/code would run code."""
    for name in ("no_weights", "no_shard", "code", "empty"):
        hub.hf.config.save_pretrained(name)
        hub.repos[f"org/{name}"] = tmp_path / name
    Path("no_shard/model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    torch.save(torch.nn.Linear(1000, 1000), "code/pytorch_model.bin")
    os.remove("empty/config.json")
    for name, named in dict(empty="config.json", no_weights="model.safetensors", no_shard="lost.safetensors",
                            code="pytorch_model.bin", private="HF_TOKEN").items():
        assert named in refusal(f"org/{name}")
    for source in ("org/nothing", "org/gated", "org/tiny@v9", "a/b/c", "org/broken", "org/bad_close", "org/bad_garbage",
                   "org/bad_loop", "org/bad_short", "org/bad_long", "org/bad_cut"):
        assert source in refusal(source)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert_same_logits(hub.hf, "org/private")


def test_a_hub_that_can_not_be_reached_and_a_full_disk(hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refusal("org/tiny")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        assert "File too large" in refusal("org/tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same_logits(hub.hf, "org/tiny")  # nothing is left in the cache that is taken for whole
