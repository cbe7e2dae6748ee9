"""Weights from a hub: a tiny one on 127.0.0.1."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, random_hf
from tiny_hub import COMMIT, serve

from model import GPT

@pytest.fixture
def hub(tmp_path):
    """A hub with org/tiny: a random GPT-2 in transformers' format."""
    with serve({"org/tiny": tmp_path / "tiny"}) as server:
        server.hf = random_hf()
        server.hf.save_pretrained(tmp_path / "tiny")
        yield server


@pytest.fixture
def load(hub, tmp_path):
    """load(sources...) in a process of its own: for each the logits of tokens 0 to 19, or the error's text."""

    def load(*sources, code=None, **env):
        code = code or """
import json, sys, torch
from model import GPT
for source in sys.argv[1:]:
    try:
        print(json.dumps(GPT.from_pretrained(source).eval()(torch.arange(20)[None])[0].tolist()))
    except (OSError, ValueError) as e:
        print(json.dumps(str(e)))
"""
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": REPO} | env
        done = subprocess.run([sys.executable, "-c", code, *sources], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']

    return load


def expected(hub):
    with torch.no_grad():
        return hub.hf(torch.arange(20)[None]).logits


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, load):
    first, at_revision, at_commit = load("org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}")
    for logits in (first, at_revision, at_commit):
        torch.testing.assert_close(torch.tensor(logits), expected(hub), atol=1e-4, rtol=0)
    assert [r[2] for r in hub.requests if r[0] == "GET" and r[2].endswith(".safetensors")] == ["model.safetensors"]
    (offline,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert offline == first


def test_an_interrupted_download_goes_on_where_it_stopped(hub, load, tmp_path):
    hf = random_hf(n_layer=1, n_head=12, n_embd=768)  # 29 MB: huggingface_hub writes 10 MiB at a time
    hf.save_pretrained(tmp_path / "large")
    hub.repos["org/large"] = tmp_path / "large"
    hub.cut["model.safetensors"] = 15_000_000
    (logits,) = load("org/large")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), hf(torch.arange(20)[None]).logits, atol=1e-4, rtol=0)
    assert [r[3] for r in hub.requests if r[0] == "GET" and r[2] == "model.safetensors"] == [None, f"bytes={10 * 2**20}-"]


def test_sharded_safetensors_and_pytorch_model_bin(hub, load, tmp_path):
    hub.hf.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    hub.hf.config.save_pretrained(tmp_path / "bin")
    torch.save(hub.hf.state_dict(), tmp_path / "bin/pytorch_model.bin")
    hub.repos |= {"org/sharded": tmp_path / "sharded", "bin": tmp_path / "bin"}
    for logits in load("org/sharded", "bin"):
        torch.testing.assert_close(torch.tensor(logits), expected(hub), atol=1e-4, rtol=0)


def test_what_the_hub_refuses_is_said_in_one_line(hub, load, tmp_path):
    (tmp_path / "empty").mkdir()
    hub.hf.config.save_pretrained(tmp_path / "no_weights")
    (tmp_path / "shard_missing").mkdir()
    hub.hf.config.save_pretrained(tmp_path / "shard_missing")
    (tmp_path / "shard_missing/model.safetensors.index.json").write_text('{"weight_map": {"a": "lost.safetensors"}}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    (tmp_path / "pickle").mkdir()
    hub.hf.config.save_pretrained(tmp_path / "pickle")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickle/pytorch_model.bin")
    hub.repos |= {f"org/{name}": tmp_path / name for name in ("empty", "no_weights", "shard_missing", "other", "pickle")}
    cases = {
        "org/nothing": "has no such repository; for a private one", "org/private": "401 Unauthorized'",
        "org/gated": "accept its terms", "org/tiny@v9": "no revision v9", "org/empty": "not the file config.json",
        "org/no_weights": "without model.safetensors or pytorch_model.bin", "org/shard_missing": "not the file lost.safetensors",
        "org/other": "model_type is 'llama'", "org/pickle": "not plain tensors", "a/b/c": "has no repositories of such names", "org/broken": "can't be asked (Client error '418",
    }
    for (source, message), text in zip(cases.items(), load(*(f"./{s}"[2:] for s in cases))):
        assert isinstance(text, str) and message in text and "\n" not in text, (source, text)
    assert "set HF_TOKEN" in load("org/private")[0]
    (logits,) = load("org/private", HF_TOKEN="secret")
    assert not isinstance(logits, str)


def test_a_hub_that_can_not_be_reached_and_a_full_disk(hub, load, tmp_path):
    (text,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert "nor is it in the cache" in text
    limited = """
import json, resource, signal, sys
from model import GPT
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    GPT.from_pretrained("org/tiny")
except OSError as e:
    print(json.dumps(str(e)))
"""
    (text,) = load(code=limited)
    assert "File too large" in text and "\n" not in text
    (logits,) = load("org/tiny")  # and nothing is left in the cache that a second try would take for whole
    torch.testing.assert_close(torch.tensor(logits), expected(hub), atol=1e-4, rtol=0)


def test_a_published_ln_free_model_loads_as_ln_free(tmp_path):
    """Its form: LN weights times 1e6 and an eps of 1e12, which drowns the variance."""
    hf = random_hf()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                p.mul_(1e6)
    hf.config.layer_norm_epsilon = 1e12
    for module in hf.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e12
    hf.save_pretrained(tmp_path / "free")
    model = GPT.from_pretrained(tmp_path / "free").eval()
    assert model.ln_free() and set(model.ln_modes().values()) == {"fake"}
    idx = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], hf(idx).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.fold()(idx)[0], hf(idx).logits, atol=1e-4, rtol=1e-4)
