"""
Weights from a hub, a tiny one on 127.0.0.1: fetched once, in all their forms, and each refusal is one line.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPO, random_hf
from tiny_hub import COMMIT, serve

from model import GPT

IDX = torch.arange(20)[None]

# for each source of argv the logits of tokens 0 to 19, or the line that refuses it
LOAD = """
import json, sys, torch
from model import GPT
from parts.errors import UserError
for source in sys.argv[1:]:
    try:
        print(json.dumps(GPT.from_pretrained(source).eval()(torch.arange(20)[None])[0].tolist()))
    except UserError as e:
        print(json.dumps(str(e)))
"""
SMALL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


@pytest.fixture
def hub(tmp_path):
    """A hub with org/tiny: a random GPT-2 in transformers' format."""
    with serve({"org/tiny": tmp_path / "tiny"}) as server:
        server.hf = random_hf()
        server.hf.save_pretrained(tmp_path / "tiny")
        yield server


@pytest.fixture
def load(hub, tmp_path):
    """load(sources...) in a process of its own, as huggingface_hub reads its environment once: what LOAD prints."""

    def load(*sources, code=LOAD, **env):
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": REPO} | env
        command = [sys.executable, "-c", code, *sources]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']

    return load


@torch.no_grad()
def assert_logits_of(hf, logits):
    torch.testing.assert_close(torch.tensor(logits), hf(IDX).logits, atol=1e-4, rtol=0)


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, load, tmp_path):
    first, at_revision, at_commit = load("org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}")
    for logits in (first, at_revision, at_commit):
        assert_logits_of(hub.hf, logits)
    gets = [file for command, _, file, _ in hub.requests if command == "GET"]
    assert [file for file in gets if file.endswith(".safetensors")] == ["model.safetensors"]
    (offline,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert offline == first

    (cached,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    os.truncate(cached.resolve(), 1000)  # of another size than the hub's: fetched anew
    assert load("org/tiny") == [first]


def test_all_forms_are_read_and_an_interrupted_download_goes_on_where_it_stopped(hub, load, tmp_path):
    large = random_hf(n_layer=1, n_head=12, n_embd=768)  # 29 MB: huggingface_hub writes 10 MiB at a time
    large.save_pretrained(tmp_path / "large")
    hub.cut["model.safetensors"] = 15_000_000
    hub.hf.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    hub.hf.config.save_pretrained(tmp_path / "bin")
    torch.save(hub.hf.state_dict(), tmp_path / "bin/pytorch_model.bin")
    hub.repos |= {"org/large": tmp_path / "large", "org/sharded": tmp_path / "sharded", "bin": tmp_path / "bin"}
    for logits, hf in zip(load("org/large", "org/sharded", "bin"), (large, hub.hf, hub.hf), strict=True):
        assert_logits_of(hf, logits)
    gets = [(file, part) for command, _, file, part in hub.requests if command == "GET"]
    assert [part for file, part in gets if file == "model.safetensors"] == [None, f"bytes={10 * 2**20}-"]


def test_what_can_not_be_had_is_said_in_one_line(hub, load, tmp_path):
    for name in ("no_weights", "shard_missing", "pickle", "code"):
        hub.hf.config.save_pretrained(tmp_path / name)
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    index = tmp_path / "shard_missing/model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "lost.safetensors"}}')
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickle/pytorch_model.bin")
    torch.save(torch.nn.Linear(1000, 1000), tmp_path / "code/pytorch_model.bin")
    for name in ("empty", "no_weights", "shard_missing", "other", "pickle", "code"):
        hub.repos[f"org/{name}"] = tmp_path / name

    messages = {
        "org/nothing": "RepositoryNotFoundError",
        "org/private": "HF_TOKEN",
        "org/gated": "org/gated",
        "org/tiny@v9": "RevisionNotFoundError",
        "org/empty": "config.json",
        "org/no_weights": "model.safetensors",
        "org/shard_missing": "lost.safetensors",
        "org/other": "llama",
        "org/pickle": "bytes",  # fewer than parameters
        "org/code": "pytorch_model.bin",
        "a/b/c": "a/b/c",
        "org/broken": "418",
        "org/bad_close": "org/bad_close",
        "org/bad_garbage": "org/bad_garbage",
        "org/bad_loop": "org/bad_loop",
        "org/bad_short": "org/bad_short",
    }
    for text, message in zip(load(*messages), messages.values(), strict=True):
        assert isinstance(text, str) and message in text and "\n" not in text, (message, text)
    (logits,) = load("org/private", HF_TOKEN="secret")
    assert_logits_of(hub.hf, logits)


@pytest.mark.slow
def test_a_line_that_is_cut_each_time_is_said_in_one_line(load):
    for text in load("org/bad_long", "org/bad_cut"):
        assert "org/bad_" in text and "\n" not in text


def test_a_hub_that_can_not_be_reached_and_a_full_disk(hub, load):
    (text,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert "org/tiny" in text and "HF_HUB_OFFLINE" in text
    (text,) = load("org/tiny", code=SMALL_DISK + LOAD)
    assert "File too large" in text and "\n" not in text
    (logits,) = load("org/tiny")  # nothing is left in the cache that a second try would take for whole
    assert_logits_of(hub.hf, logits)


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
