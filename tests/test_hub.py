"""
Weights from a hub, a tiny one on 127.0.0.1: fetched once, in all their forms, and each refusal is one
line.
"""
import json
import os
import subprocess
import sys

import hostile_hub
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
    """load(sources...) in a process of its own, as huggingface_hub reads its environment once: what
    LOAD prints."""

    def load(*sources, code=LOAD, **env):
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": REPO} | env
        command = [sys.executable, "-c", code, *sources]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']

    return load


@torch.no_grad()
def assert_logits_of(hf, logits):
    torch.testing.assert_close(torch.tensor(logits), hf(IDX).logits, atol=1e-4, rtol=0)


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, load):
    first, at_revision, at_commit = load("org/tiny", "org/tiny@v2", f"org/tiny@{COMMIT}")
    for logits in (first, at_revision, at_commit):
        assert_logits_of(hub.hf, logits)
    gets = [file for command, _, file, _ in hub.requests if command == "GET"]
    assert [file for file in gets if file.endswith(".safetensors")] == ["model.safetensors"]
    (offline,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert offline == first


def test_an_interrupted_download_goes_on_where_it_stopped(hub, load, tmp_path):
    hf = random_hf(n_layer=1, n_head=12, n_embd=768)  # 29 MB: huggingface_hub writes 10 MiB at a time
    hf.save_pretrained(tmp_path / "large")
    hub.repos["org/large"] = tmp_path / "large"
    hub.cut["model.safetensors"] = 15_000_000
    (logits,) = load("org/large")
    assert_logits_of(hf, logits)
    gets = [(file, part) for command, _, file, part in hub.requests if command == "GET"]
    assert [part for file, part in gets if file == "model.safetensors"] == [None, f"bytes={10 * 2**20}-"]


def test_sharded_safetensors_and_pytorch_model_bin(hub, load, tmp_path):
    hub.hf.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    hub.hf.config.save_pretrained(tmp_path / "bin")
    torch.save(hub.hf.state_dict(), tmp_path / "bin/pytorch_model.bin")
    hub.repos |= {"org/sharded": tmp_path / "sharded", "bin": tmp_path / "bin"}
    for logits in load("org/sharded", "bin"):
        assert_logits_of(hub.hf, logits)


def test_what_the_hub_refuses_is_said_in_one_line(hub, load, tmp_path):
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
        "org/gated": "accept its terms",
        "org/tiny@v9": "RevisionNotFoundError",
        "org/empty": "config.json",
        "org/no_weights": "model.safetensors",
        "org/shard_missing": "lost.safetensors",
        "org/other": "llama",
        "org/pickle": "bytes",  # fewer than parameters
        "org/code": "pytorch_model.bin",
        "a/b/c": "a/b/c",
        "org/broken": "418",
    }
    texts = load(*messages)
    assert len(texts) == len(messages)
    for message, text in zip(messages.values(), texts):
        assert isinstance(text, str) and message in text and "\n" not in text, (message, text)


def test_a_cached_file_of_another_size_is_fetched_anew(hub, load, tmp_path):
    load("org/tiny")
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/model.safetensors")
    os.truncate(cached.resolve(), 1000)
    (logits,) = load("org/tiny")
    assert_logits_of(hub.hf, logits)


@pytest.mark.parametrize("kind", [
    "close",
    "garbage",
    "loop",
    pytest.param("long", marks=pytest.mark.slow),
    "short",
    pytest.param("cut", marks=pytest.mark.slow),
])
def test_a_hub_that_answers_nonsense_ends_in_one_line(tmp_path, kind):
    """After what the library says of its own tries. It closes the line, answers what is no HTTP, redirects to
    itself, promises more bytes than it sends or fewer, and cuts the line each time."""
    with hostile_hub.serve() as env:
        env = os.environ | env | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": REPO}
        done = subprocess.run([sys.executable, "-c", LOAD, f"org/{kind}"], env=env, capture_output=True, text=True,
                              timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"org/{kind} is not a directory here" in json.loads(done.stdout.splitlines()[-1])


def test_a_private_model_needs_a_token(hub, load):
    (text,) = load("org/private")
    assert "set HF_TOKEN" in text
    (logits,) = load("org/private", HF_TOKEN="secret")
    assert not isinstance(logits, str)


def test_a_hub_that_can_not_be_reached_and_a_full_disk(hub, load):
    (text,) = load("org/tiny", HF_HUB_OFFLINE="1")
    assert "org/tiny" in text and "HF_HUB_OFFLINE" in text
    (text,) = load("org/tiny", code=SMALL_DISK + LOAD)
    assert "File too large" in text
    assert "\n" not in text
    (logits,) = load("org/tiny")  # nothing is left in the cache that a second try would take for whole
    assert_logits_of(hub.hf, logits)


def with_eps(hf, eps):
    """A transformers model with another eps in all its LayerNorms."""
    hf.config.layer_norm_epsilon = eps
    for module in hf.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return hf


def test_an_eps_that_is_large_and_no_more_does_not_make_a_model_ln_free(tmp_path):
    hf = with_eps(random_hf(), 1.5)
    hf.save_pretrained(tmp_path / "model")
    model = GPT.from_pretrained(tmp_path / "model").eval()
    assert set(model.ln_modes().values()) == {"real"}
    with torch.no_grad():
        torch.testing.assert_close(model(IDX)[0], hf(IDX).logits, atol=1e-4, rtol=1e-4)


def test_a_published_ln_free_model_loads_as_ln_free(tmp_path):
    """Its form: LN weights times 1e6 and an eps of 1e12, which drowns the variance."""
    hf = random_hf()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                p.mul_(1e6)
    with_eps(hf, 1e12).save_pretrained(tmp_path / "free")
    model = GPT.from_pretrained(tmp_path / "free").eval()
    assert model.ln_free()
    assert set(model.ln_modes().values()) == {"fake"}
    with torch.no_grad():
        expected = hf(IDX).logits
        torch.testing.assert_close(model(IDX)[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.fold()(IDX)[0], expected, atol=1e-4, rtol=1e-4)
