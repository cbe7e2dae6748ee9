"""
Other people's models and text: what has a right value gets it, by transformers' and AutoTokenizer's account, and the
rest is refused or said.
"""
import json
import os
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import SHORT, TINY, random_hf, read_json, read_tokens, set_all_fake, write_dataset
from tokenizers import models, normalizers, pre_tokenizers
from transformers import GPT2LMHeadModel

from model import GPT, std_of
from parts.errors import UserError
from parts.tokenizer import PROBES, make_tokenizer
from schedule import remove

# --- models


@torch.no_grad()
def logits_of(directory, ids):
    """Ours, and transformers'."""
    theirs = GPT2LMHeadModel.from_pretrained(directory).eval()
    return GPT.from_pretrained(directory).eval()(ids)[0], theirs(ids).logits


@pytest.mark.parametrize("change", [
    dict(activation_function="gelu_pytorch_tanh"),
    dict(activation_function="gelu_fast"),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(scale_attn_weights=False),
    dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    dict(hidden_size=64, n_embd=None, num_hidden_layers=3, n_layer=None, num_attention_heads=4, n_head=None),
    dict(max_position_embeddings=96, n_positions=96),
    dict(layer_norm_epsilon=1.5),
])
def test_configs_that_mean_a_gpt2_give_transformers_logits_and_are_a_plain_one_when_saved(change, tmp_path):
    random_hf().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json") | change
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(300, (2, 40))
    found, expected = logits_of(tmp_path, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    GPT.from_pretrained(tmp_path).save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits_of(tmp_path / "ours", ids)[1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [dict(num_hidden_layers=2), dict(add_cross_attention=True)])
def test_other_configs_are_refused_by_name(change, tmp_path):
    random_hf().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(read_json(tmp_path / "config.json") | change))
    with pytest.raises(UserError, match=[*change][0]):
        GPT.from_pretrained(tmp_path)


def test_shards_of_a_pickle_are_read_and_a_file_is_refused(tmp_path):
    hf = random_hf()
    hf.config.save_pretrained(tmp_path)
    index = {}
    for i, (key, tensor) in enumerate(hf.state_dict().items()):
        index[key] = f"pytorch_model-{i}.bin"
        torch.save({key: tensor}, tmp_path / index[key])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=index)))
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        found = GPT.from_pretrained(tmp_path).eval()(ids)[0]
        torch.testing.assert_close(found, hf(ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="pytorch_model-0.bin"):
        GPT.from_pretrained(str(tmp_path / "pytorch_model-0.bin"))


# --- the constants


def test_each_ordinary_token_counts_the_same_however_they_are_spread_over_micro_batches():
    few = torch.randint(256, (2, 20))
    few[0, 3:] = 256
    batches = [torch.randint(256, (3, 20)), torch.full((2, 20), 256), few]
    model, other = GPT.from_pretrained(TINY), GPT.from_pretrained(TINY).eval()
    remove(model, [(0, "ln_2", 0)], 0, lambda step: batches, lambda t: t, "ordinary", 0.0)
    seen = []
    other.transformer.h[0].ln_2.register_forward_pre_hook(lambda site, args: seen.append(std_of(args[0], 1e-5)))
    with torch.no_grad():
        for idx in batches:
            other(idx)
    stds = torch.cat([std[..., 0][(idx != 256) & (torch.arange(20) > 0)] for std, idx in zip(seen, batches)])
    site = model.sites()["h.0.ln_2"]
    assert site.avg_std.item() == pytest.approx(stds.mean().item(), rel=1e-5)
    assert site.bos_std.item() == pytest.approx(torch.cat([std[:, 0, 0] for std in seen]).mean().item(), rel=1e-5)


def test_a_step_of_end_of_text_alone_takes_the_next_ones_tokens_and_says_so():
    eot, text = torch.full((2, 20), 256), torch.randint(256, (2, 20))
    first, second = GPT.from_pretrained(TINY), GPT.from_pretrained(TINY).eval()
    (entry,) = remove(first, [(5, "ln_2", 0)], 5, lambda step: [text if step == 7 else eot], lambda t: t, "ordinary", 0)
    second.measure_std(text)
    assert entry["measured_at"] == 7
    assert entry["avg_std"] == pytest.approx(second.sites()["h.0.ln_2"].avg_std.item(), rel=1e-5)
    with pytest.raises(UserError, match="steps 5 to 24"):
        remove(first, [(5, "ln_2", 1)], 5, lambda step: [eot], lambda t: t, "ordinary", 0)


# --- tokenizers


def test_the_fingerprints_of_gpt2_and_bytes(gpt2_tokenizer):
    assert {name: make_tokenizer(name).fingerprint() for name in PROBES} == PROBES


def test_data_of_another_tokenizer_is_refused_unless_asked_for(run, own_model, tmp_path):
    """The model's own; the same saved again; bytes in a vocabulary of the same size; another of the same kind."""
    same, other = shutil.copytree(own_model, tmp_path / "same"), shutil.copytree(own_model, tmp_path / "other")
    content = read_json(same / "tokenizer.json")
    (same / "tokenizer.json").write_text(json.dumps(content, indent=7))
    vocab = content["model"]["vocab"]
    a, b = [token for token, i in vocab.items() if i in (70, 80)]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("def read(self, size):\n" * 300)
    train = ["train.py", *SHORT, "--max_iters=1", "--force", f"--init_from={own_model}"]
    for name in (own_model, same, "bytes", other):
        data = f"--dataset={os.path.basename(name)}"
        assert run("prepare_owt.py", "--files=a.txt", data, f"--tokenizer={name}").code == 0
        for command in (train, ["eval.py", f"--models={own_model}"]):
            done = run(*command, data)
            if name in (own_model, same):
                assert done.code == 0, done.text
            else:
                assert f"data/{os.path.basename(name)}" in done.error
                assert run(*command, data, "--any_tokenizer").code == 0
    assert str(other) in run("eval.py", f"--models={own_model},{other}", "--dataset=same").error


def test_prepare_says_what_a_tokenizer_loses(run):
    """Lower case, unknown words, and an end-of-text that is an ordinary word."""
    words = tokenizers.Tokenizer(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Lowercase()
    words.save("tokenizer.json")
    Path("tokenizer_config.json").write_text('{"eos_token": "the"}')
    Path("a.txt").write_text("The fox and THE fox " * 100)
    said = run("prepare_owt.py", "--files=a.txt", "--dataset=words", "--tokenizer=.").text
    ids = read_tokens("train", "words").tolist()
    assert f"{ids.count(2) / len(ids):.3%} of data/words/train.bin is the unknown token" in said
    assert "loses text" in said
    assert "'the'" in said


# --- documents


def test_spelled_special_tokens_are_counted_and_end_documents_if_asked(run, tmp_path):
    stories = ["Once upon\na time", "there was", "a fox"]
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(["", *stories, "\n"]))
    rows = [dict(text="a<|endoftext|>b"), dict(text="c")] * 20
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ["prepare_owt.py", "--files=a.txt,b.jsonl", "--val_every=1"]
    assert "note: 24 special tokens are spelled" in run(*prepare, "--dataset=spelled").text
    assert "spelled" not in run(*prepare, "--dataset=split", "--split_on=<|endoftext|>").text
    found = bytes(id if id < 256 else 0 for id in read_tokens("val", "split").tolist())
    expected = [*("\n" + story for story in stories), *["a", "b", "c"] * 20]
    assert found == b"".join(document.encode() + b"\0" for document in expected)
    assert "--split_on" in run(*prepare, "--dataset=c", "--split_on=a b").error


@pytest.mark.parametrize("character", [" ", "\xa0", "\t"])
def test_a_run_that_gpt2s_tokenizer_can_not_take_is_refused_with_its_row(run, tmp_path, gpt2_tokenizer, character):
    rows = [dict(text="short"), dict(text="a" + 1_000_000 * character + "b")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "a.jsonl, row 2" in run("prepare_owt.py", "--files=a.jsonl", "--dataset=a", "--tokenizer=gpt2").error


# --- evaluation


@pytest.fixture
def runs(run):
    """Two finished removals with a control each, out/a and out/b, trained at windows of 64 and 32."""
    write_dataset()
    for name, factor, window in (("a", 1.0, 64), ("b", 1.1, 32)):
        model = GPT.from_pretrained(TINY)
        model.transformer.h[0].mlp.c_fc.weight.data.mul_(factor)
        model.save_pretrained(f"out/{name}_control/model")
        model.measure_std(torch.arange(64)[None] % 250)
        set_all_fake(model).save_pretrained(f"out/{name}/model")
        settings = dict(init_from=TINY, ln_schedule=[], dataset="mine", block_size=window)
        for folder in (name, name + "_control"):
            Path("out", folder, "settings.json").write_text(json.dumps(settings))


def test_eval_takes_the_window_that_was_trained_on(run, runs):
    for flags, window in ((f"{TINY},out/a", 64), ("out/a,out/b", 32), (TINY, 256), ("out/a --block_size=128", 128)):
        said = run("eval.py", "--dataset=mine", *f"--models={flags}".split()).text
        assert f"windows of {window} val tokens" in said
        assert ("--block_size=256" in said) == (window in (32, 64))


def test_each_model_is_compared_with_its_own_control(run, runs):
    models = "--models=out/a_control,out/b_control,"
    done = run("eval.py", models + "out/b,out/a", "--dataset=mine", "--json=r.json")
    rows = {row["source"]: row for row in read_json("r.json")["rows"]}
    for name in ("out/a", "out/b"):
        assert rows[name]["gap"] == pytest.approx(rows[name]["loss"] - rows[name + "_control"]["loss"], abs=1e-6)
    assert "gap to its control" in done.text
    shutil.move("out/a", "out/c")
    run("eval.py", models + "out/c", "--dataset=mine", "--json=r.json")
    assert read_json("r.json")["rows"][-1]["gap"] is None  # it can't be known which is its control


# --- paths


def test_a_tilde_is_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.mkdir("home")
    shutil.copytree(TINY, "home/tiny")
    Path("home/a.txt").write_text("text " * 2000)
    assert run("prepare_owt.py", "--files=~/a.txt", "--dataset=mine").code == 0
    args = [*SHORT[1:], "--init_from=~/tiny", "--out_dir=~/run", "--dataset=mine", "--max_iters=1"]
    assert run("train.py", *args).code == 0
    assert run("eval.py", "--models=~/tiny,~/run", "--dataset=mine", "--json=~/e.json").code == 0
    assert len(read_json("home/e.json")["rows"]) == 2
    assert sorted(os.listdir()) == ["data", "home"]
    assert run("tools.sample", "~/run", "--prompt=~/", "--max_new_tokens=1", "--temperature=0").text.startswith("~/")
