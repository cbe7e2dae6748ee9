"""
Weights from a hub, a tiny one on 127.0.0.1: fetched once, in all their forms, and each refusal is one line.
"""
import os
import resource
import signal

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
        server.hf.save_pretrained(tmp_path / "tiny")
        yield server


@torch.no_grad()
def logits_of(source):
    return GPT.from_pretrained(source).eval()(IDX)[0]


def refusal(source):
    """The line that refuses a source."""
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(source)
    return str(caught.value)


@torch.no_grad()
def assert_logits_of(hf, logits):
    torch.testing.assert_close(logits, hf(IDX).logits, atol=1e-4, rtol=0)


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, tmp_path, monkeypatch):
    for source in ("org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}"):
        assert_logits_of(hub.hf, logits_of(source))
    gets = [file for command, _, file, _ in hub.requests if command == "GET"]
    assert [file for file in gets if file.endswith(".safetensors")] == ["model.safetensors"]
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert_logits_of(hub.hf, logits_of("org/tiny"))
    os.truncate(cached.resolve(), 1000)  # of another size than the hub's: fetched anew
    assert_logits_of(hub.hf, logits_of("org/tiny"))


def test_all_forms_are_read_and_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    large = random_hf(n_layer=1, n_head=12, n_embd=768)  # 29 MB: huggingface_hub writes 10 MiB at a time
    large.save_pretrained(tmp_path / "large")
    hub.cut["model.safetensors"] = 15_000_000
    hub.hf.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    hub.hf.config.save_pretrained(tmp_path / "bin")
    torch.save(hub.hf.state_dict(), tmp_path / "bin/pytorch_model.bin")
    hub.repos |= {"org/large": tmp_path / "large", "org/sharded": tmp_path / "sharded", "org/bin": tmp_path / "bin"}
    for source, hf in (("org/large", large), ("org/sharded", hub.hf), ("org/bin", hub.hf)):
        assert_logits_of(hf, logits_of(source))
    gets = [(file, part) for command, _, file, part in hub.requests if command == "GET"]
    assert [part for file, part in gets if file == "model.safetensors"] == [None, f"bytes={10 * 2**20}-"]


def test_what_can_not_be_had_is_said_in_one_line(hub, tmp_path, monkeypatch):
    """Reading org/code would run code."""
    for name in ("no_weights", "shard_missing", "code"):
        hub.hf.config.save_pretrained(tmp_path / name)
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    index = tmp_path / "shard_missing/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "lost.safetensors"}}')
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    torch.save(torch.nn.Linear(1000, 1000), tmp_path / "code/pytorch_model.bin")
    hub.repos |= {f"org/{name}": tmp_path / name for name in ("empty", "no_weights", "shard_missing", "other", "code")}
    for source, named in {
        "org/empty": "config.json",
        "org/no_weights": "model.safetensors",
        "org/shard_missing": "lost.safetensors",
        "org/other": "model_type",
        "org/code": "pytorch_model.bin",
        "org/private": "HF_TOKEN",
    }.items():
        assert named in refusal(source)
    for source in ("org/nothing", "org/gated", "org/tiny@v9", "a/b/c", "org/broken", "org/bad_close", "org/bad_garbage",
                   "org/bad_loop", "org/bad_short", "org/bad_long", "org/bad_cut"):
        assert source in refusal(source)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert_logits_of(hub.hf, logits_of("org/private"))


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
    assert_logits_of(hub.hf, logits_of("org/tiny"))  # nothing is left in the cache that is taken for whole


# the published LN-free form has LN weights times 1e6 and an eps of 1e12, which drowns the variance
@pytest.mark.parametrize("eps, scale, mode", [(1.5, 1, "real"), (1e12, 1e6, "fake")])
def test_eps_says_whether_a_model_is_ln_free(tmp_path, eps, scale, mode):
    hf = random_hf()
    hf.config.layer_norm_epsilon = eps
    for module in hf.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
            module.weight.data *= scale
    hf.save_pretrained(tmp_path / "model")
    model = GPT.from_pretrained(tmp_path / "model").eval()
    assert set(model.ln_modes().values()) == {mode}
    assert model.ln_free() == (mode == "fake")
    with torch.no_grad():
        expected = hf(IDX).logits
        torch.testing.assert_close(model(IDX)[0], expected, atol=1e-4, rtol=1e-4)
        if model.ln_free():
            torch.testing.assert_close(model.fold()(IDX)[0], expected, atol=1e-4, rtol=1e-4)
