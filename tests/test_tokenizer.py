"""
A model's own tokenizer, tokenizer.json beside it, goes the whole way: text, training, evaluation, sampling and
every export. Oracles: the tokenizers library on the whole text, and transformers.
"""
import json
import os
import shutil

import pytest
import tokenizers
import torch
from conftest import END, TINY, random_hf, read_json, read_tokens, set_all_fake, text
from tokenizers import decoders, models, pre_tokenizers

from model import GPT
from parts.tokenizer import make_tokenizer, tokenizer_of

def encode(directory, content):
    """What the tokenizers library gives, with the spelled end-of-text as text."""
    bpe = tokenizers.Tokenizer.from_file(directory + "/tokenizer.json")
    bpe.encode_special_tokens = True
    return bpe.encode(content, add_special_tokens=False).ids


SHORT = ["--max_iters=4", "--batch_size=2", "--block_size=16", "--eval_iters=1", "--compile=False"]
SCHEDULE = [("ln_2", 1, 0), ("ln_1qk", 1, 0), ("ln_1v", 2, 0), ("ln_f", 2, None), ("bos", 3, None)]


@pytest.fixture
def removed(run, own_model):
    """out/run: the removal from the model, on text prepared with its own tokenizer."""
    for i in range(3):
        with open(f"{i}.txt", "w") as f:
            f.write(text(300, i))
    done = run("prepare_owt.py", "--files=*.txt", "--dataset=own", f"--tokenizer={own_model}")
    assert done.code == 0, done.text
    done = run("train.py", f"--init_from={own_model}", "--dataset=own", *SHORT, f"--ln_schedule={SCHEDULE}")
    assert done.code == 0, done.text


def test_text_is_prepared_with_the_tokens_of_the_whole(run, own_model):
    content = text(80_000)
    assert len(content.encode()) > 1.2e6  # more than is read at one time
    with open("a.txt", "w") as f:
        f.write(content)
    done = run("prepare_owt.py", "--files=a.txt", "--dataset=own", f"--tokenizer={own_model}")
    assert done.code == 0, done.text
    meta = read_json("data/own/meta.json")
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == (own_model, 300, 0)
    train, val = read_tokens("train", "own").tolist(), read_tokens("val", "own").tolist()
    assert train[-1] == val[-1] == 0
    assert train.count(0) == val.count(0) == 1  # what spells it in the text stays text
    bpe = tokenizers.Tokenizer.from_file(own_model + "/tokenizer.json")
    halves = [bpe.decode(ids[:-1], skip_special_tokens=False) for ids in (train, val)]
    assert "".join(halves) == content
    assert train[:-1] == encode(own_model, halves[0])


def test_it_goes_from_text_to_sampling_and_evaluation(run, own_model, removed):
    assert GPT.from_pretrained("out/run/model").config.eot == 0
    prompt = "def read(self, "
    done = run("tools.sample", "out/run", f"--prompt={prompt}", "--max_new_tokens=20", "--temperature=0")
    assert done.code == 0, done.text
    model = GPT.from_pretrained("out/run/model").eval()
    ids = encode(own_model, prompt)
    with torch.no_grad():
        for _ in range(20):
            ids.append(model(torch.tensor([ids[-32:]]))[0][0, -1].argmax().item())
            if ids[-1] == 0 or len(ids) == 32:
                break
    bpe = tokenizers.Tokenizer.from_file(own_model + "/tokenizer.json")
    assert done.text.startswith(bpe.decode(ids[:-1], skip_special_tokens=False).rstrip("\ufffd"))

    with open("new.txt", "w") as f:
        f.write(text(200, 9))
    done = run("eval.py", "--models=out/run", "--dataset=new.txt", "--json=r.json")
    assert done.code == 0, done.text
    assert read_tokens("val", "eval_new.txt").tolist() == [*encode(own_model, text(200, 9)), 0]


def test_every_export_carries_it(run, own_model, removed):
    from transformers import AutoTokenizer, pipeline

    for to in ("hf", "folded"):
        done = run("tools.export", "out/run", f"--to={to}")
        assert done.code == 0, done.text
        assert "no tokenizer files" not in done.text
        found = AutoTokenizer.from_pretrained(f"out/run/{to}")("class Reader:").input_ids
        assert found == encode(own_model, "class Reader:")
    written = pipeline("text-generation", "out/run/hf")("class Reader", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("class Reader")


def test_another_tokenizer_under_the_same_path_is_another_preparation(run, own_model, tmp_path):
    shutil.copytree(own_model, "mine")
    (tmp_path / "a.txt").write_text(text(50))
    args = ["--files=a.txt", "--dataset=own", "--tokenizer=mine"]
    assert run("prepare_owt.py", *args).code == 0
    assert "prepared already" in run("prepare_owt.py", *args).text
    with open("mine/tokenizer.json", "a") as f:
        f.write("\n")
    assert "data/own holds tokenizer_sha256 " in run("prepare_owt.py", *args).error


def test_sampled_words_keep_their_spaces(run, own_model):
    """With a tokenizer whose decoder, as SentencePiece's, drops the space before the first word."""
    words = ["one", "two", "three", "four"]
    vocab = {END: 0, "\u2581": 1} | {"\u2581" + word: i for i, word in enumerate(words, 2)}
    bpe = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    hf = random_hf(vocab_size=len(vocab))
    with torch.no_grad():
        hf.transformer.wte.weight[:2] = 0  # it never says END
    hf.save_pretrained("words")
    bpe.save("words/tokenizer.json")
    with open("words/tokenizer_config.json", "w") as f:
        json.dump(dict(eos_token=END), f)
    done = run("tools.sample", "words", "--prompt=one two", "--max_new_tokens=3", "--top_k=1")
    assert done.code == 0, done.text
    ids = [vocab["\u2581" + word] for word in done.text.split()]
    assert len(ids) == 5
    with torch.no_grad():
        model, given = GPT.from_pretrained("words").eval(), ids[:2]
        while len(given) < 5:
            given.append(model(torch.tensor([given]))[0][0, -1].argmax().item())
    assert given == ids


def test_a_document_is_taken_whole_whatever_truncation_the_file_asks_for(run, own_model, tmp_path):
    bpe = tokenizers.Tokenizer.from_file(own_model + "/tokenizer.json")
    bpe.enable_truncation(16)
    bpe.enable_padding(length=64)
    os.makedirs("cutting")
    bpe.save("cutting/tokenizer.json")
    (tmp_path / "cutting/tokenizer_config.json").write_text(json.dumps(dict(eos_token=END)))
    assert make_tokenizer("cutting").encode(text(50)).tolist() == encode(own_model, text(50))


def test_another_models_tokenizer_is_gone_when_its_run_is_replaced(run, own_model, removed, stdlib_data):
    os.symlink(os.path.join(stdlib_data, "stdlib"), "data/stdlib")
    assert os.path.exists("out/run/model/tokenizer.json")
    done = run("train.py", f"--init_from={TINY}", *SHORT, "--max_iters=1", "--force")
    assert done.code == 0, done.text
    assert sorted(os.listdir("out/run/model")) == ["config.json", "model.safetensors"]


def test_a_tokenizer_without_an_end_of_text_is_refused(run, own_model, tmp_path):
    bpe = tokenizers.Tokenizer.from_file(own_model + "/tokenizer.json")
    os.makedirs("bare")
    bpe.save("bare/tokenizer.json")
    (tmp_path / "a.txt").write_text("a" * 100)
    done = run("prepare_owt.py", "--files=a.txt", "--tokenizer=bare")
    assert "bare: neither tokenizer_config.json nor config.json names an eos_token" in done.error


def test_a_tokenizer_that_is_none_is_refused(run, tmp_path):
    os.makedirs("bad")
    (tmp_path / "bad/tokenizer.json").write_text("{")
    (tmp_path / "a.txt").write_text("a" * 100)
    assert "bad/tokenizer.json can't be read" in run("prepare_owt.py", "--files=a.txt", "--tokenizer=bad").error
    assert "unknown tokenizer './nowhere'" in run("prepare_owt.py", "--files=a.txt", "--tokenizer=./nowhere").error


def test_a_tokenizer_of_more_ids_than_the_models_is_refused(own_model, tmp_path):
    hf = random_hf(vocab_size=290)
    hf.save_pretrained(tmp_path)
    tokenizers.Tokenizer.from_file(own_model + "/tokenizer.json").save(str(tmp_path / "tokenizer.json"))
    model = set_all_fake(GPT.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="has 300 ids, but the model knows 290"):
        tokenizer_of(model, str(tmp_path))


