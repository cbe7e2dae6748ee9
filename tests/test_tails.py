"""
dev/tails.py: the tokens that are hidden from a fine-tuning, the five texts, and their figures.
"""
import os

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, set_all_fake
from tokenizers import Tokenizer, models, pre_tokenizers

from dev import outliers, tails
from model import GPT, GPTConfig
from parts.data import open_tokens
from parts.files import write_json

WORDS = ["Ġrare", "seldom", "Ġoften"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = {token: i for i, token in enumerate(["<|endoftext|>", *BYTES, *WORDS])}
A, TAB = IDS["a"], IDS["ĉ"]


def write(name, tokens):
    os.makedirs(f"data/testbed_{name}")
    for split in ("train", "val"):
        np.array(tokens, "<u2").tofile(f"data/testbed_{name}/{split}.bin")
    meta = dict(vocab_size=len(IDS), eot=0, tokenizer="mine", train=dict(tokens=len(tokens)),
                val=dict(tokens=len(tokens)))
    write_json(f"data/testbed_{name}/meta.json", meta)


@pytest.fixture
def testbed(monkeypatch, tmp_path):
    """A pretraining text in which two of three words are rare, and others with a tab in their second window of 8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tails, "VOCAB", len(IDS))
    monkeypatch.setattr(tails, "BLOCK", 8)
    os.makedirs("data/testbed_texts/tokenizer")
    Tokenizer(models.BPE(vocab=IDS, merges=[])).save("data/testbed_texts/tokenizer/tokenizer.json")
    counts = {A: 9460, IDS["Ġrare"]: 20, IDS["seldom"]: 20, IDS["Ġoften"]: 500}
    write("pretrain", [i for i, n in counts.items() for _ in range(n)])
    document = [0, *range(A, A + 20)]
    write("tune", [A] * 11 + [TAB] + [A] * 11 + [IDS["seldom"]] + document)
    write("choose", [A] * 11 + [TAB] + [A] * 12 + document * 4)


def test_hidden_are_control_characters_other_alphabets_and_the_rarest_words(testbed):
    hidden = tails.hidden_tokens()
    assert hidden[TAB] and hidden[IDS["Ã"]]  # the first byte of é
    assert [bool(hidden[IDS[word]]) for word in WORDS] == [True, True, False]
    assert not hidden[[0, A, IDS["Ċ"], IDS["Ġ"], IDS["~"]]].any()
    assert hidden.sum() == 256 - 96 + 2  # all bytes but a newline and 95 printable ones


def test_the_fine_tuning_text_has_no_window_with_a_hidden_token(testbed):
    tails.write_seen()
    seen = open_tokens("testbed_seen", "train", 8, len(IDS))
    assert seen.tolist() == [A] * 8 + [0, *range(A, A + 15)]


def test_the_five_texts(testbed):
    texts = tails.texts("choose", 32)
    assert TAB in texts["hidden"][0] and texts["text"].shape == texts["hidden"].shape == (4, 9)
    assert texts["random"].shape == (1, 9)
    single, runs = texts["single"], texts["runs"]
    assert single[:, 8].tolist() == list(range(len(IDS)))
    assert (np.delete(single, 8, 1) == [0, *range(A, A + 15)]).all()
    assert (runs[:, :8] == single[0, :8]).all() and runs[:, 8].tolist() == list(range(0, len(IDS), 32))


def test_figures_against_the_model_by_hand(testbed, monkeypatch):
    monkeypatch.setattr(tails, "FAR", 5.6)
    torch.manual_seed(0)
    made = {name: GPT(GPTConfig(16, len(IDS), 2, 2, 32, eot=0)).eval() for name in ("original", "free")}
    set_all_fake(made["free"])
    made["free"].lm_head.weight.data.mul_(10)  # tied: some losses lie above ln 260 = 5.56
    found = tails.tails(made, "original", "choose", 32)
    windows = torch.from_numpy(tails.texts("choose", 32)["single"].astype(np.int64))
    x, y = windows[:, :-1], windows[:, 1:]
    with torch.no_grad():
        log_q, log_p = (m(x)[0].log_softmax(-1) for m in made.values())
    loss = -log_p.gather(2, y.unsqueeze(2))
    expected = dict(loss=loss.mean(), kl=(log_q.exp() * (log_q - log_p)).sum(-1).mean(), max=loss.max(),
                    p99_9=loss.quantile(0.999), far=(loss > 5.6).sum(),
                    norm=made["free"].run_blocks(x)[0][:, 1:].norm(dim=-1).max())
    assert 0 < expected["far"] < loss.numel()
    assert found["free", "single"] == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)
    assert found["original", "single"]["kl"] == 0


def test_outliers_have_a_long_stream_between_the_first_mlp_and_the_last():
    tiny = GPT.from_pretrained(TINY).eval()
    outlier, text = 130, torch.arange(64)[None] % 50
    text[0, 10::10] = outlier
    others = torch.arange(50, 100)[None]
    with torch.no_grad():
        before = tiny(others, streams=True)[0]
        outliers.add_outliers(tiny, [outlier], text)
        streams, after = tiny(text, streams=True)[0], tiny(others, streams=True)[0]
    is_outlier = text == outlier
    for stream in streams[:-1]:
        assert stream[is_outlier].norm(dim=-1) == pytest.approx(outliers.NORM, rel=0.1)
        assert stream[~is_outlier].norm(dim=-1).max() < outliers.NORM / 8
    assert streams[-1][is_outlier].norm(dim=-1).max() < outliers.NORM / 5
    for a, b in zip(before, after):  # text without outliers changes little
        assert (a - b).norm(dim=-1).median() < 0.25 * a.norm(dim=-1).median()


@pytest.mark.slow
def test_outliers_that_the_text_lacks_explode_with_the_recipe_and_not_with_faithful(run, stdlib):
    """The bundled model with four control characters as outliers. The text has none of them."""
    outlier = torch.arange(1, 5)
    windows = [np.asarray(open_tokens("stdlib", split, 256, 257)[: 24 * 257], np.int64).reshape(24, 257)
               for split in ("train", "val")]
    train, val = map(torch.from_numpy, windows)
    assert not torch.isin(train, outlier).any()
    train[:, 100] = val[:, 100] = outlier.repeat(6)
    original = GPT.from_pretrained(TINY).eval()
    outliers.add_outliers(original, outlier.tolist(), train[:, :-1])
    original.save_pretrained("original/model")
    recipe, faithful = [f"{REPO}/config/remove_ln_tiny.py"], [f"{REPO}/config/faithful.py"]
    flags = ["--init_from=original/model", "--max_iters=60", "--lr_decay_iters=60", "--batch_size=8",
             "--learning_rate=8e-4", "--eval_interval=60"]
    for configs, out_dir in ((recipe, "recipe"), (recipe + faithful, "faithful")):
        done = run("train.py", *configs, *flags, f"--out_dir={out_dir}")
        assert done.code == 0, done.text

    def losses(folder):
        logits, _ = GPT.from_pretrained(f"{folder}/model").eval()(val[:, :-1])
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), val[:, 1:], reduction="none")

    with torch.no_grad():
        loss = {folder: losses(folder) for folder in ("original", "recipe", "faithful")}
    before, after = ({name: x[:, part].mean().item() for name, x in loss.items()}
                     for part in (slice(100), slice(100, None)))  # before the outlier, and from it on
    assert before["recipe"] == pytest.approx(before["original"], abs=0.2)
    assert after["recipe"] > 20 and (loss["recipe"] > 50).float().mean() > 0.1
    assert after["faithful"] < after["original"] + 0.5 and loss["faithful"].max() < 50
