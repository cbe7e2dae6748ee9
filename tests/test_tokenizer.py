"""
A model's own tokenizer, tokenizer.json beside it, goes the whole way: text, training, evaluation, sampling and
every export. Oracles: the tokenizers library on the whole text, and transformers.
"""
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import END, TINY, random_hf, read_json, read_tokens, text
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from model import GPT
from parts.errors import UserError
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


# --- whose ids: transformers' AutoTokenizer is the oracle

GPT2_END = "<|endoftext|>"
PROBE = " Hello world def Read\n\n naïve <|user|> 1e-5  x"


def byte_level(lower=False):
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if lower:
        bpe.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[GPT2_END], initial_alphabet=alphabet)
    bpe.train_from_iterator(["def read(self): return hello world Hello"] * 9, trainer)
    return bpe


def model_directory(folder, bpe, form, **files):
    """A GPT-2's config.json, and its tokenizer as tokenizer.json or as vocab.json and merges.txt."""
    random_hf(vocab_size=300, n_layer=1).config.save_pretrained(folder)
    if form == "whole":
        bpe.save(str(folder / "tokenizer.json"))
    else:
        model = json.loads(bpe.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


USER = dict(content="<|user|>", special=False, lstrip=True, rstrip=False, normalized=True, single_word=False)


@pytest.mark.parametrize("form, lower, config, more", [
    ("whole", False, {}, {}),
    ("whole", True, {}, {}),  # GPT2Tokenizer drops the normalizer
    ("whole", True, dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=GPT2_END), {}),
    ("whole", False, dict(tokenizer_class="GPT2TokenizerFast", add_prefix_space=True), {}),
    ("whole", False, dict(tokenizer_class="GPT2Tokenizer", added_tokens_decoder={"NEXT": USER}), {}),
    ("whole", False, {}, dict(added_tokens={"<|user|>": "NEXT"})),
    ("whole", False, dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="a"),
     dict(special_tokens_map=dict(eos_token=GPT2_END))),
    ("parts", False, {}, {}),
    ("parts", False, dict(add_prefix_space=True, eos_token="z"), {}),
])
def test_the_ids_are_those_of_autotokenizer(tmp_path, form, lower, config, more):
    from transformers import AutoTokenizer

    bpe = byte_level(lower)
    size = bpe.get_vocab_size()
    config, more = json.loads(json.dumps([config, more]).replace('"NEXT": {', f'"{size}": {{').replace('"NEXT"', str(size)))
    directory = model_directory(tmp_path, bpe, form, tokenizer_config=config, **more)
    theirs, ours = AutoTokenizer.from_pretrained(directory), make_tokenizer(directory)
    assert ours.encode(PROBE).tolist() == theirs(PROBE, add_special_tokens=False).input_ids
    assert ours.eot == theirs.eos_token_id
    assert ours.decode(ours.encode(PROBE).tolist()) == theirs.decode(theirs(PROBE, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("files", [
    {"vocab.txt": "a"},
    {"spiece.model": "a"},
    {"vocab.json": "{}"},
    {"tokenizer_config.json": "{}"},
    {"tokenizer.json": "{"},
    {"tokenizer.json": "WHOLE", "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'},
    {"tokenizer.json": "WHOLE", "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'},  # no end
    {"tokenizer.json": "WHOLE", "added_tokens.json": '{"<|user|>": 295}'},  # not the next id
])
def test_what_can_not_be_read_as_transformers_does_is_refused(tmp_path, files):
    model = GPT.from_pretrained(TINY)
    random_hf(vocab_size=300, n_layer=1).config.save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(byte_level().to_str() if content == "WHOLE" else content)
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer_of(model, str(tmp_path))


@pytest.mark.parametrize("vocab_size, eot, name", [
    (50257, 50256, "gpt2"),
    (50304, 50256, "gpt2"),
    (52000, 50256, None),
    (50257, 0, None),
    (257, 256, "bytes"),
    (320, 256, "bytes"),
    (4096, 256, None),
    (300, 50256, None),
])
def test_without_tokenizer_files_the_vocabulary_says_it(tmp_path, gpt2_tokenizer, vocab_size, eot, name):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size, eot=eot))
    if name:
        assert tokenizer_of(model, str(tmp_path)).name == name
    else:
        with pytest.raises(UserError, match=str(tmp_path)):
            tokenizer_of(model, str(tmp_path))


@pytest.mark.parametrize("broken", [models.WordLevel({"a": 0}, unk_token="?"), models.BPE(), models.Unigram()])
def test_without_an_unknown_token_or_a_vocabulary_it_is_one_line(tmp_path, broken):
    tokenizers.Tokenizer(broken).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(UserError, match="tokenizer.json"):
        make_tokenizer(str(tmp_path)).encode("a b")


def test_a_tokenizer_of_more_ids_than_the_models_is_refused(own_model):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=290, eot=0))
    with pytest.raises(UserError, match="300 ids"):
        tokenizer_of(model, own_model)
