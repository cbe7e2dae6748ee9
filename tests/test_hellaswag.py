"""
HellaSwag in eval.py: the scores are those of transformers, one forward pass for each ending, and its file is fetched
whole or not at all.
"""
import filecmp
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, random_hf, read_json
from tiny_hub import serve
from torch.nn.functional import cross_entropy

from model import GPT
from parts import hellaswag
from parts.errors import UserError
from parts.hellaswag import Example, read_examples, score

# 42 examples in the published format, written for these tests
OWN = os.path.join(os.path.dirname(__file__), "hellaswag_42.jsonl")
PATH = "data/hellaswag/hellaswag_val.jsonl"
with open(OWN) as f:
    ROWS = [json.loads(line) for line in f]


def encode_bytes(text):
    return list(text.encode())


@torch.no_grad()
def one_at_a_time(logits_of, rows, encode, block_size):
    """Summed losses and counts (n, 4): each ending in a forward pass of its own, longer ones cut at the left.
    logits_of: ids (1, T) -> (1, T, vocab)."""
    sums, counts = np.zeros((len(rows), 4)), np.zeros((len(rows), 4), int)
    for i, row in enumerate(rows):
        for k, text in enumerate(row["endings"]):
            ending = encode(" " + text)
            whole = encode(row["ctx"]) + ending
            ids = torch.tensor([whole[-(block_size + 1) :]])
            logits = logits_of(ids[:, :-1])
            losses = cross_entropy(logits[0], ids[0, 1:], reduction="none")[-len(ending) :]
            sums[i, k] = losses.sum()
            counts[i, k] = len(losses)
    return sums, counts


@pytest.fixture
def own_file(run):
    """Our 42 examples in HellaSwag's place."""
    os.makedirs("data/hellaswag")
    shutil.copy(OWN, PATH)


# --- the scores


@pytest.mark.parametrize("vocab_size", [257, 50257])  # bytes, and GPT-2's tokens
def test_accuracies_are_transformers_one_ending_at_a_time(run, own_file, gpt2_tokenizer, vocab_size):
    import tiktoken

    encode = encode_bytes if vocab_size == 257 else tiktoken.get_encoding("gpt2").encode_ordinary
    hf = random_hf(vocab_size=vocab_size, n_positions=256)
    hf.save_pretrained("random")

    done = run("eval.py", "--models=random", "--dataset=hellaswag", "--json=r.json")

    assert done.code == 0, done.text
    sums, counts = one_at_a_time(lambda ids: hf(ids).logits, ROWS, encode, 256)
    labels = np.array([row["label"] for row in ROWS])
    (found,) = read_json("r.json")["rows"]
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = (losses.argmin(1) == labels).mean()
        assert found[key] == pytest.approx(right)
        assert found[key + "_se"] == pytest.approx((right * (1 - right) / 42) ** 0.5)
        assert f"{right:.2%}" in done.text
    assert len(ROWS) == found["examples"] == 42


@pytest.mark.parametrize("block_size", [96, 48])  # an example at one time, and an ending at a time
def test_of_equal_endings_the_first_wins(tmp_path, block_size):
    random_hf(vocab_size=320, n_positions=block_size).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    examples = [Example(e.context, [e.endings[0], e.endings[1]] * 2, 0) for e in read_examples(OWN)]
    sums, _ = score(model, examples, encode_bytes, "cpu", torch.no_grad())
    assert (sums[:, 2:] == sums[:, :2]).all()
    assert sums.argmin(1).max() <= 1


# of bytes, all examples fit, some, none, and not even an ending
@pytest.mark.parametrize("block_size", [96, 48, 24, 8])
def test_what_is_longer_than_the_context_is_cut_at_the_left(block_size, tmp_path):
    hf = random_hf(vocab_size=320, n_positions=block_size)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    found_sums, found_counts = score(model, read_examples(OWN)[:12], encode_bytes, "cpu", torch.no_grad())
    sums, counts = one_at_a_time(lambda ids: hf(ids).logits, ROWS[:12], encode_bytes, block_size)
    assert np.array_equal(found_counts, counts)
    assert np.allclose(found_sums, sums, atol=1e-3)


def test_position_0_keeps_its_constant_with_fake_sites_and_the_bos_treatment():
    model = GPT.from_pretrained(TINY).eval()
    model.measure_std(torch.randint(0, 256, (4, 64)))
    for layer in range(4):
        model.set_ln_mode("ln_1qk", layer, "fake")
    model.set_treatment("bos", True)
    found, _ = score(model, read_examples(OWN)[:8], encode_bytes, "cpu", torch.no_grad())
    sums, _ = one_at_a_time(lambda ids: model(ids)[0], ROWS[:8], encode_bytes, 256)
    assert np.allclose(found, sums, atol=1e-3)


# --- the file


@pytest.fixture
def server(run, tmp_path, monkeypatch):
    """A hub on this machine that has our 42 examples as HellaSwag's file, and a small model."""
    random_hf(vocab_size=257).save_pretrained("random")
    shutil.copy(OWN, tmp_path / "hellaswag_val.jsonl")
    (tmp_path / "page.html").write_text("<html>")
    with serve({"org/hellaswag": tmp_path}) as server:
        server.folder = server.env["HF_ENDPOINT"] + "/org/hellaswag/resolve/main/"
        monkeypatch.setattr(hellaswag, "URL", server.folder + "hellaswag_val.jsonl")
        yield server


EVAL = ["eval.py", "--models=random", "--dataset=hellaswag"]


def test_the_file_is_fetched_once_and_is_whole_or_not_there(run, server):
    server.cut["hellaswag_val.jsonl"] = 5000
    assert "hellaswag_val.jsonl" in run(*EVAL).error
    assert not os.path.exists(PATH)

    for _ in range(2):
        assert run(*EVAL).code == 0
    assert len(server.requests) == 2
    assert filecmp.cmp(PATH, OWN, shallow=False)
    assert os.listdir("data/hellaswag") == ["hellaswag_val.jsonl"]


@pytest.mark.parametrize("file", ["not_there", "page.html", "no network"])
def test_what_can_not_be_fetched_is_one_line(run, server, monkeypatch, file):
    url = "http://127.0.0.1:9/x" if file == "no network" else server.folder + file
    monkeypatch.setattr(hellaswag, "URL", url)
    error = run(*EVAL).error
    assert "hellaswag_val.jsonl" in error or url in error
    assert not os.path.exists(PATH)


@pytest.mark.parametrize("line", [
    "[]",
    '{"ctx": "A", "endings": ["a", "b", "c"], "label": 0}',
    '{"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 4}',
    '{"ctx": 5, "endings": ["a", "b", "c", "d"], "label": 0}',
])
def test_a_line_that_is_not_an_example_is_named(tmp_path, line):
    lines = [json.dumps(row) for row in ROWS]
    lines[2] = line
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="a.jsonl, line 3"):
        read_examples(str(tmp_path / "a.jsonl"))
