"""hellaswag.py: the same predictions as transformers, one ending at a time; its file, fetched and checked."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, random_hf
from tiny_hub import serve

import hellaswag
from model import GPT

OWN = os.path.join(os.path.dirname(__file__), "hellaswag_42.jsonl")  # 42 examples in the published format, written for this test


def one_at_a_time(hf, rows, encode, block_size):
    """Summed losses and counts (n, 4): each ending in a forward pass of its own, longer ones cut at the left."""
    sums, counts = np.zeros((len(rows), 4)), np.zeros((len(rows), 4), int)
    for i, row in enumerate(rows):
        for k, text in enumerate(row["endings"]):
            ending = encode(" " + text)
            ids = torch.tensor([(encode(row["ctx"]) + ending)[-(block_size + 1) :]])
            with torch.no_grad():
                logits = hf(ids[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")[-len(ending) :]
            sums[i, k], counts[i, k] = losses.sum(), len(losses)
    return sums, counts


@pytest.fixture
def own_file(tmp_path, run):
    os.makedirs("data/hellaswag")
    shutil.copy(OWN, "data/hellaswag/hellaswag_val.jsonl")
    return [json.loads(line) for line in open(OWN)]


def test_predictions_and_accuracies_are_transformers_one_ending_at_a_time(run, own_file):
    from transformers import AutoModelForCausalLM

    done = run("eval.py", f"--models={TINY}", "--dataset=hellaswag", "--json=r.json")
    assert done.code == 0, done.text
    sums, counts = one_at_a_time(AutoModelForCausalLM.from_pretrained(TINY).eval(), own_file, lambda text: list(text.encode()), 256)
    labels = np.array([row["label"] for row in own_file])
    (row,) = json.load(open("r.json"))["rows"]
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = (losses.argmin(1) == labels).mean()
        assert row[key] == pytest.approx(right) and row[key + "_se"] == pytest.approx((right * (1 - right) / 42) ** 0.5)
        assert f"{right:.2%}" in done.text
    assert len(own_file) == row["examples"] == 42
    ours = hellaswag.score(GPT.from_pretrained(TINY).eval(), hellaswag.read_examples(OWN), lambda text: list(text.encode()), "cpu", torch.no_grad())
    assert np.allclose(ours[0], sums, atol=1e-3) and np.array_equal(ours[1], counts)


@pytest.mark.parametrize("block_size", [96, 48, 24, 8])
def test_what_is_longer_than_the_context_is_cut_at_the_left(block_size, gpt2_tokenizer):
    """Bytes: all examples fit, some, none, and not even an ending."""
    hf = random_hf(vocab_size=320, n_positions=block_size)
    hf.save_pretrained(folder := os.path.join(os.environ["TIKTOKEN_CACHE_DIR"], f"hf_{block_size}"))
    rows = [json.loads(line) for line in open(OWN)][:12]
    encode = lambda text: list(text.encode())
    sums, counts = one_at_a_time(hf, rows, encode, block_size)
    ours = hellaswag.score(GPT.from_pretrained(folder).eval(), hellaswag.read_examples(OWN)[:12], encode, "cpu", torch.no_grad())
    assert np.array_equal(ours[1], counts) and np.allclose(ours[0], sums, atol=1e-3)


def test_gpt2s_tokenizer_and_the_bos_and_fake_sites(run, own_file, gpt2_tokenizer):
    import tiktoken

    model = GPT.from_pretrained(TINY)
    hf = random_hf(vocab_size=50257, n_positions=64)
    hf.save_pretrained("random")
    assert run("eval.py", "--models=random", "--dataset=hellaswag", "--json=r.json").code == 0
    sums, counts = one_at_a_time(hf, own_file, tiktoken.get_encoding("gpt2").encode_ordinary, 64)
    labels = np.array([row["label"] for row in own_file])
    assert json.load(open("r.json"))["rows"][0]["acc_norm"] == pytest.approx(((sums / counts).argmin(1) == labels).mean())

    model.measure_std(torch.randint(0, 256, (4, 64)))  # fake sites with the bos treatment: position 0 is still position 0
    for layer in range(4):
        model.set_ln_mode("ln_1qk", layer, "fake")
    model.set_treatment("bos", True)
    encode = lambda text: list(text.encode())
    wrapped = lambda ids: type("Out", (), dict(logits=model.eval()(ids)[0]))
    sums, _ = one_at_a_time(wrapped, own_file[:8], encode, 256)
    assert np.allclose(hellaswag.score(model.eval(), hellaswag.read_examples(OWN)[:8], encode, "cpu", torch.no_grad())[0], sums, atol=1e-3)


# --- the file


@pytest.fixture
def server(tmp_path):
    shutil.copy(OWN, tmp_path / "hellaswag_val.jsonl")
    with serve({"org/hellaswag": tmp_path}) as server:
        yield server


def address(server):
    return server.env["HF_ENDPOINT"] + "/org/hellaswag/resolve/main/hellaswag_val.jsonl"


def test_the_file_is_fetched_once_and_goes_on_where_it_broke_off(run, server):
    server.cut["hellaswag_val.jsonl"] = 5000
    args = ["eval.py", f"--models={TINY}", "--dataset=hellaswag", f"--hellaswag_url={address(server)}"]
    done = run(*args)
    assert done.code == 1 and "run it again to go on, or download it by hand to data/hellaswag/hellaswag_val.jsonl" in done.text and "Traceback" not in done.text
    assert os.path.getsize("data/hellaswag/hellaswag_val.jsonl.tmp") == 4096
    assert run(*args).code == 0 and run(*args).code == 0
    assert [r for *_, r in server.requests] == [None, "bytes=4096-"]
    assert open("data/hellaswag/hellaswag_val.jsonl").read() == open(OWN).read()


def test_no_network_or_a_wrong_address_says_what_to_do(run, server):
    for url, problem in ((address(server) + "x", "the server answers 404"), ("http://127.0.0.1:9/x", "ConnectionError")):
        done = run("eval.py", f"--models={TINY}", "--dataset=hellaswag", f"--hellaswag_url={url}")
        assert done.code == 1 and problem in done.text and "download it by hand to data/hellaswag/hellaswag_val.jsonl" in done.text


@pytest.mark.parametrize("line, message", [
    ("", "line 3 is empty"), ('{"ctx": "A man', "line 3 is not an example of HellaSwag (JSONDecodeError"), ("[]", "line 3 is not an example"),
    ('{"ctx": "A", "endings": ["a", "b", "c"], "label": 0}', "four endings"), ('{"ctx": "A", "endings": ["a", "b", "c", "d"], "label": 4}', "a label from 0 to 3"),
    ('{"ctx": "A", "endings": "abcd", "label": 0}', "four endings"), ('{"ctx": "A", "endings": [1, 2, 3, 4], "label": 0}', "four endings"), ('{"ctx": 5, "endings": ["a", "b", "c", "d"], "label": 0}', "it needs a ctx"),
])
def test_a_line_that_is_not_an_example_is_named(run, own_file, line, message):
    lines = open(OWN).read().splitlines()
    with open("data/hellaswag/hellaswag_val.jsonl", "w") as f:
        f.write("\n".join([*lines[:2], line, *lines[3:]]))
    done = run("eval.py", f"--models={TINY}", "--dataset=hellaswag")
    assert done.code == 1 and message in done.text and "data/hellaswag/hellaswag_val.jsonl, " in done.text and "Traceback" not in done.text


def test_a_tokenizer_that_is_not_known_is_refused(run, own_file):
    random_hf().save_pretrained("other")
    assert "end-of-text is 299, which is neither GPT-2's tokenizer nor bytes" in run("eval.py", "--models=other", "--dataset=hellaswag").text
