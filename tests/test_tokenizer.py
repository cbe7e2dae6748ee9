"""
A model's own tokenizer, tokenizer.json beside it, goes the whole way: text, training, evaluation, sampling and every
export. Oracles: the tokenizers library on the whole text, and transformers.
"""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import END, TINY, random_hf, read_tokens, text
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from model import GPT
from parts.errors import UserError
from parts.tokenizer import make_tokenizer, tokenizer_of

FAST = dict(tokenizer_class="PreTrainedTokenizerFast")


def tokenizer_in(directory):
    """The tokenizers library's, which leaves the spelled end-of-text as text."""
    bpe = tokenizers.Tokenizer.from_file(directory + "/tokenizer.json")
    bpe.encode_special_tokens = True
    return bpe


def encode(directory, content):
    return tokenizer_in(directory).encode(content, add_special_tokens=False).ids


def likeliest(directory, ids, n):
    """ids, and the n likeliest tokens that follow one by one."""
    model = GPT.from_pretrained(directory).eval()
    with torch.no_grad():
        for _ in range(n):
            ids = [*ids, model(torch.tensor([ids]))[0][0, -1].argmax().item()]
    return ids


def test_text_is_prepared_with_the_tokens_of_the_whole(run, own_model):
    content = text(80_000)
    assert len(content.encode()) > 1.2e6  # more than is read at one time
    Path("a.txt").write_text(content)
    assert run("prepare_owt.py", "--files=a.txt", "--dataset=own", f"--tokenizer={own_model}").code == 0
    train, val = read_tokens("train", "own").tolist(), read_tokens("val", "own").tolist()
    assert train[-1] == val[-1] == 0
    assert train.count(0) == val.count(0) == 1  # what spells it in the text stays text
    halves = [tokenizer_in(own_model).decode(ids[:-1], skip_special_tokens=False) for ids in (train, val)]
    assert "".join(halves) == content
    assert train[:-1] == encode(own_model, halves[0])


@pytest.mark.slow
def test_it_goes_from_text_to_sampling_evaluation_and_exports(run, own_model, stdlib_data):
    shutil.copytree(own_model, "mine")
    Path("a.txt").write_text(text(900))
    prepare = ["prepare_owt.py", "--files=*.txt", "--dataset=own", "--tokenizer=mine"]
    assert run(*prepare).code == 0
    schedule = [("ln_2", 1, 0), ("ln_1qk", 1, 0), ("ln_1v", 2, 0), ("ln_f", 2, None), ("bos", 3, None)]
    train = ["train.py", "--max_iters=4", "--batch_size=2", "--block_size=16", "--eval_iters=1", "--compile=False"]
    assert run(*train, "--init_from=mine", "--dataset=own", f"--ln_schedule={schedule}").code == 0
    assert GPT.from_pretrained("out/run/model").config.eot == 0

    prompt = "def read(self, "
    written = run("tools.sample", "out/run", f"--prompt={prompt}", "--max_new_tokens=20", "--temperature=0").text
    ids = likeliest("out/run/model", encode(own_model, prompt), 20)
    expected = tokenizer_in(own_model).decode(ids, skip_special_tokens=False)
    assert written.startswith(expected.partition(END)[0].rstrip("\ufffd"))

    Path("new.txt").write_text(text(200, 9))
    assert run("eval.py", "--models=out/run", "--dataset=new.txt", "--json=r.json").code == 0
    assert read_tokens("val", "eval_new.txt").tolist() == [*encode(own_model, text(200, 9)), 0]

    for to in ("hf", "folded"):
        assert run("tools.export", "out/run", f"--to={to}").code == 0
        found = AutoTokenizer.from_pretrained(f"out/run/{to}")("class Reader:").input_ids
        assert found == encode(own_model, "class Reader:")

    # a run of another model takes it away
    assert os.path.exists("out/run/model/tokenizer.json")
    os.symlink(os.path.join(stdlib_data, "stdlib"), "data/stdlib")
    assert run(*train, f"--init_from={TINY}", "--max_iters=1", "--force").code == 0
    assert sorted(os.listdir("out/run/model")) == ["config.json", "model.safetensors"]

    # another tokenizer under the same path is another preparation
    os.remove("new.txt")
    assert run(*prepare).code == 0
    with open("mine/tokenizer.json", "a") as f:
        f.write("\n")
    assert "tokenizer_sha256" in run(*prepare).error


def test_sampled_words_keep_their_spaces(run):
    """With a tokenizer whose decoder, as SentencePiece's, drops the space before the first word."""
    vocab = {END: 0, "\u2581": 1, "\u2581one": 2, "\u2581two": 3, "\u2581three": 4, "\u2581four": 5}
    bpe = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    hf = random_hf(vocab_size=len(vocab))
    with torch.no_grad():
        hf.transformer.wte.weight[:2] = 0  # it never says END
    hf.save_pretrained("words")
    bpe.save("words/tokenizer.json")
    Path("words/tokenizer_config.json").write_text(json.dumps(FAST | dict(eos_token=END)))
    written = run("tools.sample", "words", "--prompt=one two", "--max_new_tokens=3", "--top_k=1").text
    ids = [vocab["\u2581" + word] for word in written.split()]
    assert ids == likeliest("words", ids[:2], 3)


# --- whose ids: transformers' AutoTokenizer is the oracle

GPT2_END = "<|endoftext|>"
NEXT = 280  # byte_level has as many ids
PROBE = " Hello world def Read\n\n naïve <|user|> 1e-5  x"


def byte_level():
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=NEXT, special_tokens=[GPT2_END], initial_alphabet=alphabet)
    bpe.train_from_iterator(["def read(self): return hello world Hello"] * 9, trainer)
    return bpe


USER = dict(content="<|user|>", special=False, lstrip=True, rstrip=False, normalized=True, single_word=False)


@pytest.mark.parametrize("form, config, more", [
    ("whole", {}, {}),
    ("lower", {}, {}),  # GPT2Tokenizer drops the normalizer
    ("lower", FAST | dict(eos_token=GPT2_END), {}),
    ("short", FAST | dict(eos_token=GPT2_END), {}),  # a document is taken whole
    ("whole", dict(tokenizer_class="GPT2TokenizerFast", add_prefix_space=True), {}),
    ("whole", dict(tokenizer_class="GPT2Tokenizer", added_tokens_decoder={NEXT: USER}), {}),
    ("whole", {}, dict(added_tokens={"<|user|>": NEXT})),
    ("whole", FAST | dict(eos_token="a"), dict(special_tokens_map=dict(eos_token=GPT2_END))),
    ("parts", {}, {}),
    ("parts", dict(add_prefix_space=True, eos_token="z"), {}),
])
def test_the_ids_are_those_of_autotokenizer(tmp_path, form, config, more):
    bpe = byte_level()
    if form == "lower":
        bpe.normalizer = normalizers.Lowercase()
    elif form == "short":
        bpe.enable_truncation(8)
        bpe.enable_padding(length=64)
    random_hf(vocab_size=300, n_layer=1).config.save_pretrained(tmp_path)
    if form == "parts":
        bpe.model.save(str(tmp_path))  # vocab.json and merges.txt
    else:
        bpe.save(str(tmp_path / "tokenizer.json"))
    for name, content in dict(tokenizer_config=config, **more).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), make_tokenizer(str(tmp_path))
    ids = theirs(PROBE, add_special_tokens=False).input_ids
    assert len(ids) > 20
    assert ours.encode(PROBE).tolist() == ids
    assert ours.eot == theirs.eos_token_id
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("whole, config, more", [
    (byte_level(), dict(tokenizer_class="BertTokenizer"), {}),
    (byte_level(), FAST, {}),  # no end
    (tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="?")), dict(eos_token="a"), {}),
    (tokenizers.Tokenizer(models.BPE()), dict(eos_token="a"), {}),
    (byte_level(), {}, {"added_tokens.json": '{"<|user|>": 295}'}),  # not the next id
    (byte_level(), {}, {"added_tokens.json": json.dumps({f"<{i}>": NEXT + i for i in range(21)})}),  # 301 ids
    (None, {}, {}),
    (None, {}, {"spiece.model": "a"}),
    (None, {}, {"vocab.json": "{}"}),
])
def test_what_can_not_be_read_as_transformers_does_is_refused(tmp_path, whole, config, more):
    random_hf(vocab_size=300, n_layer=1).config.save_pretrained(tmp_path)
    if whole:
        whole.save(str(tmp_path / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": json.dumps(config), **more}.items():
        (tmp_path / name).write_text(content)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=300, eot=299))
    with pytest.raises(UserError, match=str(tmp_path)):
        tokenizer_of(model, str(tmp_path)).encode("a b")


def test_without_tokenizer_files_the_vocabulary_says_it(tmp_path, gpt2_tokenizer):
    def found(vocab_size, eot):
        return tokenizer_of(SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size, eot=eot)), str(tmp_path)).name

    assert [found(vocab_size, 50256) for vocab_size in (50257, 50304)] == ["gpt2"] * 2
    assert [found(vocab_size, 256) for vocab_size in (257, 320)] == ["bytes"] * 2
    for sizes in ((52000, 50256), (50257, 0), (4096, 256)):
        with pytest.raises(UserError, match=str(tmp_path)):
            found(*sizes)
