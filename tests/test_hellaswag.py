"""
HellaSwag in eval.py: the scores are those of transformers with one forward pass for each ending; its file is fetched
whole and read line by line.
"""
import json
import os
import shutil

import numpy as np
import pytest
import tiktoken
import torch
from conftest import TINY, random_hf, read_json
from tiny_hub import serve
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from model import GPT
from parts.errors import UserError
from parts.hellaswag import PATH, Example, fetch_examples, read_examples, score

# 42 examples in the published format, written for these tests
OWN = os.path.join(os.path.dirname(__file__), "hellaswag_42.jsonl")
EVAL = ["eval.py", "--dataset=hellaswag", "--json=r.json"]
with open(OWN) as f:
    EXAMPLES = [Example(row["ctx"], row["endings"], row["label"]) for row in map(json.loads, f)]


def encode_bytes(text):
    return list(text.encode())


def our_scores(model, examples):
    return score(model, examples, encode_bytes, "cpu", torch.no_grad())


@torch.no_grad()
def one_at_a_time(logits_of, examples, encode, block_size):
    """Summed losses and counts (n, 4): each ending in a forward pass of its own, longer ones cut at the left.
    logits_of: ids (1, T) -> (1, T, vocab)."""
    sums, counts = np.zeros((len(examples), 4)), np.zeros((len(examples), 4), int)
    for i, example in enumerate(examples):
        for k, text in enumerate(example.endings):
            ending = encode(" " + text)
            ids = torch.tensor([(encode(example.context) + ending)[-(block_size + 1) :]])
            losses = cross_entropy(logits_of(ids[:, :-1])[0], ids[0, 1:], reduction="none")[-len(ending) :]
            sums[i, k], counts[i, k] = losses.sum(), len(losses)
    return sums, counts


# --- the scores


@pytest.mark.parametrize("source", [TINY, "random"])
def test_accuracies_are_transformers_one_ending_at_a_time(run, gpt2_tokenizer, source):
    """Once with a model of bytes, and once with a model of GPT-2's tokens."""
    os.makedirs(os.path.dirname(PATH))
    shutil.copy(OWN, PATH)
    encode = encode_bytes
    if source == "random":
        encode = tiktoken.get_encoding("gpt2").encode_ordinary
        random_hf(vocab_size=50257, n_positions=64, n_embd=32, n_layer=1).save_pretrained("random")
    done = run(*EVAL, f"--models={source}")
    assert done.code == 0, done.text
    hf = AutoModelForCausalLM.from_pretrained(source).eval()
    sums, counts = one_at_a_time(lambda ids: hf(ids).logits, EXAMPLES, encode, hf.config.n_positions)
    (found,) = read_json("r.json")["rows"]
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = (losses.argmin(1) == [example.label for example in EXAMPLES]).mean()
        assert found[key] == pytest.approx(right)
        assert found[key + "_se"] == pytest.approx((right * (1 - right) / 42) ** 0.5)
        assert f"{right:.2%}" in done.text
    assert len(EXAMPLES) == found["examples"] == 42


# positions into which all examples fit, some, none, and not even an ending
@pytest.mark.parametrize("block_size", [256, 96, 48, 24, 8])
def test_what_is_longer_than_the_context_is_cut_at_the_left(block_size, tmp_path):
    hf = random_hf(vocab_size=320, n_positions=block_size)
    hf.save_pretrained(tmp_path)
    found_sums, found_counts = our_scores(GPT.from_pretrained(tmp_path).eval(), EXAMPLES[:12])
    sums, counts = one_at_a_time(lambda ids: hf(ids).logits, EXAMPLES[:12], encode_bytes, block_size)
    assert np.array_equal(found_counts, counts)
    assert np.allclose(found_sums, sums, atol=1e-3)


def test_equal_endings_have_equal_losses_so_that_the_first_wins(tmp_path):
    random_hf(vocab_size=320).save_pretrained(tmp_path)
    examples = [Example(e.context, e.endings[:2] * 2, 0) for e in EXAMPLES]
    sums, _ = our_scores(GPT.from_pretrained(tmp_path).eval(), examples)
    assert (sums[:, 2:] == sums[:, :2]).all()


# --- the file


def test_the_file_is_fetched_whole_and_once(run, tmp_path, monkeypatch):
    shutil.copy(OWN, tmp_path / "hellaswag_val.jsonl")
    with serve({"org/hellaswag": tmp_path}) as server:
        url = server.env["HF_ENDPOINT"] + "/org/hellaswag/resolve/main/hellaswag_val.jsonl"
        monkeypatch.setattr("parts.hellaswag.URL", url)
        server.cut["hellaswag_val.jsonl"] = 5000
        assert PATH in run(*EVAL, f"--models={TINY}").error
        assert not os.path.exists(PATH)
        for _ in range(2):
            assert fetch_examples() == EXAMPLES
        assert len(server.requests) == 2


GOOD = '{"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 0}'


@pytest.mark.parametrize("line", [
    "",
    "[]",
    GOOD.replace(', "d"', ""),
    GOOD.replace("0", "4"),
    GOOD.replace('"c"', "3"),
    GOOD.replace('"A"', '""'),
])
def test_a_line_that_is_not_an_example_is_named(tmp_path, line):
    path = tmp_path / "examples.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}")
    with pytest.raises(UserError, match=f"{path}, line 3"):
        read_examples(str(path))
