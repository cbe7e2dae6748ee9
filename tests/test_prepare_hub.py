"""
prepare_owt.py on rows, of local files and of a hub: text becomes nanoGPT's tokens, rows of ids are taken as documents
or windows, OpenWebText's layouts are found, and what goes wrong is one line.
"""
import gzip
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import zstandard
from conftest import random_hf, read_json, read_tokens, run_alone
from tiny_hub import serve

import prepare_owt


def texts(n):
    """n documents of source code, of very different lengths, one empty."""
    with open(json.__file__) as f:
        source = f.read()
    rng = np.random.default_rng(0)
    docs = [source[i : i + length] for i, length in zip(rng.integers(0, 5000, n), rng.integers(1, 3000, n))]
    docs[n // 2] = ""
    return docs


def without_every_200th(docs):
    return [doc for i, doc in enumerate(docs) if i % 200]


def nanogpt(docs):
    """What nanoGPT's prepare.py writes of the documents: encode_ordinary, end-of-text appended."""
    bpe = tiktoken.get_encoding("gpt2")
    return [token for doc in docs for token in [*bpe.encode_ordinary(doc), bpe.eot_token]]


def write_parquet(path, docs, column="text", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: docs, "url": [""] * len(docs)} | more), path)


def json_lines(docs, column="text"):
    return "".join(json.dumps({column: doc}) + "\n" for doc in docs).encode()


def save_random(vocab_size, n_positions):
    """A model in random/."""
    hf = random_hf(vocab_size=vocab_size, n_positions=n_positions, n_embd=16, n_head=2, n_layer=1)
    hf.save_pretrained("random")


def tokens(split, dataset):
    return read_tokens(split, dataset).tolist()


@pytest.fixture
def hub(tmp_path, monkeypatch, gpt2_tokenizer):
    monkeypatch.chdir(tmp_path)
    with serve({}) as server:
        server.env["HF_HOME"] = str(tmp_path / "cache")
        yield server


@pytest.fixture
def prepare(hub):
    def prepare(*args):
        return run_alone("prepare_owt.py", *args, env=hub.env)

    return prepare


def fetched(hub):
    return [name for method, _, name, _ in hub.requests if method == "GET" and name.endswith(".parquet")]


# --- rows of text


def test_a_hub_dataset_is_nanogpts_tokens_with_every_200th_document_in_val(hub, prepare, tmp_path):
    """A cached file of another size is fetched again."""
    docs = texts(450)
    write_parquet(tmp_path / "repo/data/train-00000-of-00002.parquet", docs[:300])
    write_parquet(tmp_path / "repo/data/train-00001-of-00002.parquet", docs[300:])
    write_parquet(tmp_path / "repo/data/test-00000-of-00001.parquet", ["not this"])
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    for again in ([], ["--force"]):
        done = prepare("--dataset=org/stories", "--val_every=200", *again)
        assert done.code == 0, done.text
        assert tokens("train", "stories") == nanogpt(without_every_200th(docs))
        assert tokens("val", "stories") == nanogpt(docs[::200])
        assert read_json("data/stories/meta.json")["train"]["documents"] == 447
        for path in (tmp_path / "cache").rglob("*00001-of-00002.parquet"):
            os.truncate(path.resolve(), 100)
    assert len(fetched(hub)) == 3


def test_tokens_stops_at_the_end_of_the_document_that_reaches_them(hub, prepare, tmp_path):
    """And files behind it are not fetched."""
    docs = texts(900)
    for i in range(3):
        write_parquet(tmp_path / f"repo/train-{i}.parquet", docs[300 * i : 300 * i + 300])
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    enough = len(nanogpt(docs[:412])) - 3
    done = prepare("--dataset=org/stories", f"--tokens={enough}", "--val_every=200")
    assert done.code == 0, done.text
    assert tokens("train", "stories") == nanogpt(without_every_200th(docs[:412]))
    assert tokens("val", "stories") == nanogpt(docs[:412:200])
    assert sorted(fetched(hub)) == ["train-0.parquet", "train-1.parquet"]


ROWS = {
    "a.parquet": None,
    "a.jsonl": lambda docs: json_lines(docs, "body"),
    "a.ndjson": lambda docs: json_lines(docs, "body"),
    "a.jsonl.gz": lambda docs: gzip.compress(json_lines(docs, "body")),
    "a.jsonl.zst": lambda docs: zstandard.compress(json_lines(docs, "body")),
    "a.json": lambda docs: json.dumps([dict(body=doc) for doc in docs]).encode(),
    "a.csv": None,
    "saved": None,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format_are_the_same_tokens(run, tmp_path, gpt2_tokenizer, name):
    docs = texts(210)
    if ROWS[name]:
        (tmp_path / name).write_bytes(ROWS[name](docs))
    elif name == "a.parquet":
        write_parquet(tmp_path / name, docs, "body")
    elif name == "a.csv":
        docs[7] = "NA"
        datasets.Dataset.from_dict(dict(body=docs)).to_csv(tmp_path / name)
    else:
        datasets.Dataset.from_dict(dict(body=docs)).save_to_disk(tmp_path / name, num_shards=3)
    args = [f"--files={name}", "--column=body", "--tokenizer=gpt2", "--dataset=rows", "--val_every=200"]
    done = run("prepare_owt.py", *args)
    assert done.code == 0, done.text
    assert tokens("train", "rows") == nanogpt(without_every_200th(docs))
    assert tokens("val", "rows") == nanogpt(docs[::200])


def test_few_long_rows_are_cut_at_their_end_as_few_text_files_are(run, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x" * 1_000_000, "short"]))
    assert run("prepare_owt.py", "--files=a.jsonl").code == 0
    assert tokens("train", "files") == [*b"x" * 950_001, 256, *b"short", 256]
    assert tokens("val", "files") == [*b"x" * 49_999, 256]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_subsets_of_the_pile_are_left_out_by_name(prepare, tmp_path, kind):
    docs = texts(400)
    metas = [dict(pile_set_name=name) for name in ["Pile-CC", "Books3", "Github", "OpenWebText2"] * 100]
    if kind == "jsonl":
        lines = [json.dumps(dict(text=doc, meta=meta)) for doc, meta in zip(docs, metas)]
        (tmp_path / "pile.jsonl").write_text("\n".join(lines))
    else:
        write_parquet(tmp_path / "pile.parquet", docs, meta=list(map(json.dumps, metas)))
    args = ["--dataset=pile_text", f"--files=pile.{kind}", "--tokenizer=gpt2", "--val_every=200"]
    done = prepare(*args, "--without=OpenWebText2,Books3,BookCorpus2")
    assert done.code == 0, done.text
    kept = docs[::2]
    assert tokens("val", "pile_text") == nanogpt(kept[::200])
    assert tokens("train", "pile_text") == nanogpt(without_every_200th(kept))


# --- rows of token ids

# rows, whether they are windows (None: can't be known), and the stream that they are, with end-of-text 1
IDS = {
    "documents": ([[5, 6, 7], [8, 9, 1], [], None, [10]], False, [5, 6, 7, 1, 8, 9, 1, 1, 1, 10, 1]),
    "end-of-text first": ([[1, 5, 6], [1, 7], [1]], False, [5, 6, 1, 7, 1, 1]),
    "end-of-text at both ends": ([[1, 5, 6, 1], [1, 7, 1]], False, [5, 6, 1, 7, 1]),
    "windows": ([[5, 1, 7]] * 4 + [[], None, [8, 9, 9]], True, [5, 1, 7] * 4 + [8, 9, 9]),
    "windows and a remainder": ([*[[5, 1, 7]] * 300, [8, 9]], True, [5, 1, 7] * 300 + [8, 9]),
    "windows and late remainders": ([*[[5, 1, 7]] * 1200, [8], *[[5, 6, 7]] * 9], True,
                                    [5, 1, 7] * 1200 + [8] + [5, 6, 7] * 9),
    "documents cut to one length": ([[5, 6, 7]] * 4, None, None),
    "overflow chunks": ([[5, 6, 7], [8], [5, 6, 7], [5, 6, 7], [9, 9]], None, None),
    "lengths of documents and end-of-text inside": ([[5, 1, 7, 8], [8], [5, 6]], None, None),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("row_type", ["", "documents", "windows"])
def test_rows_of_ids_are_documents_or_windows(run, tmp_path, kind, row_type):
    rows, windows, stream = IDS[kind]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids")
    args = ["--files=a.parquet", "--tokenizer=4096:1", "--dataset=own", "--val_every=1"]
    done = run("prepare_owt.py", *args, f"--rows={row_type}")
    windows = windows if row_type == "" else row_type == "windows"
    if windows:
        stream = sum(filter(None, rows), [])
    elif row_type == "documents" and kind not in ("documents", "end-of-text first", "end-of-text at both ends"):
        stream = sum(([*(row or []), 1] for row in rows), [])
    if windows is None:
        assert "a.parquet" in done.error
        assert "--rows=windows" in done.error
    else:
        assert done.code == 0, done.text
        assert tokens("val", "own") == stream
        meta = read_json("data/own/meta.json")["val"]
        assert meta["documents"] == len(rows)
        marked = sum(bool(row) and 1 in (row[0], row[-1]) for row in rows)
        assert meta["eot_appended"] == (0 if windows else len(rows) - marked)


def test_padding_is_left_out_where_a_mask_says_so(run, tmp_path):
    rows, masks = [[5, 6, 1, 1], [7, 1, 1, 1]], [[1, 1, 1, 0], [1, 0, 0, 0]]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids", attention_mask=masks)
    args = ["--files=a.parquet", "--tokenizer=4096:1", "--dataset=own", "--val_every=1"]
    done = run("prepare_owt.py", *args)
    assert done.code == 0, done.text
    assert tokens("val", "own") == [5, 6, 1, 7, 1]


def test_the_share_of_end_of_text_is_said(run, tmp_path):
    write_parquet(tmp_path / "a.parquet", [[5, 6, 1, 1], [7, 8, 9, 1]] * 5, "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:1", "--rows=windows", "--val_every=100")
    assert f"{13 / 36:.3%}" in done.text
    assert "4 of 13 doubled" in done.text


@pytest.mark.parametrize("tokenizer, taken", [("bytes", [*b"ab", 256]), ("4096:1", [7, 8, 1])])
def test_of_text_and_ids_the_tokenizer_takes_what_it_can(run, tmp_path, tokenizer, taken):
    pq.write_table(pa.table({"text": ["x", "ab"], "input_ids": [[5], [7, 8]]}), tmp_path / "a.parquet")
    done = run("prepare_owt.py", "--files=a.parquet", f"--tokenizer={tokenizer}", "--dataset=own", "--val_every=2")
    assert done.code == 0, done.text
    assert tokens("train", "own") == taken


def test_eval_prepares_the_pile_by_itself_all_of_it_to_evaluate_on(hub, tmp_path):
    """The tokenized Pile is fetched from the hub once; what is asked for of it is val."""
    rng = np.random.default_rng(0)
    sequences = [[50256 if i == 9 else int(t) for i, t in enumerate(rng.integers(0, 50256, 512))] for _ in range(10)]
    write_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet", sequences, "input_ids")
    hub.repos["datasets/apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"] = tmp_path / "repo"
    save_random(vocab_size=50257, n_positions=64)
    for _ in range(2):
        done = run_alone("eval.py", "--models=random", "--dataset=pile", "--json=r.json", env=hub.env)
        assert done.code == 0, done.text
    assert tokens("val", "pile") == sum(sequences, [])
    assert tokens("train", "pile") == []
    (row,) = read_json("r.json")["rows"]
    assert row["windows"] == (10 * 512 - 1) // 64
    assert 10 < row["loss"] < 13
    assert len(fetched(hub)) == 1


# --- OpenWebText


@pytest.mark.parametrize("layout", [
    "main",
    "refs-convert-parquet/plain_text/train",
    "refs-convert-parquet/plain_text/partial-train",
])
def test_openwebtext_is_found_where_it_is_today(hub, prepare, tmp_path, layout):
    """Converted on main; or a loading script on main, and the parquet conversion beside it, whole or the first part."""
    docs = texts(250)
    if layout == "main":
        write_parquet(tmp_path / "owt/plain_text/train-00000-of-00001.parquet", docs)
    else:
        write_parquet(tmp_path / "owt" / layout / "0000.parquet", docs)
        (tmp_path / "owt/openwebtext.py").write_text("# a script that datasets no longer runs")
    hub.repos["datasets/Skylion007/openwebtext"] = tmp_path / "owt"
    done = prepare("--dataset=owt", "--tokens=1_000_000", "--val_every=200")
    assert done.code == 0, done.text
    assert tokens("val", "owt") == nanogpt([docs[0], docs[200]])
    assert "250 of 8,013,769 documents" in done.text


def test_all_of_openwebtext_has_nanogpts_val_split():
    """Against datasets.train_test_split itself, at the corpus's size: indices stand for documents."""
    indices = datasets.Dataset.from_dict({"i": range(200_000)})
    theirs = indices.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare_owt.nanogpt_val_documents(200_000).tolist() == theirs["test"]["i"]
    assert len(prepare_owt.nanogpt_val_documents()) == 4007  # as nanoGPT's README counts


def test_val_is_put_into_nanogpts_order(tmp_path, monkeypatch):
    """A corpus of 5,000 documents in OpenWebText's place, in two parts. Document i is the token i."""
    monkeypatch.setattr(prepare_owt.nanogpt_val_documents, "__defaults__", (5000,))
    monkeypatch.setattr(prepare_owt, "OWT_DOCUMENTS", 5000)
    monkeypatch.setattr(prepare_owt, "dataset", "owt")
    wanted = prepare_owt.nanogpt_val_documents().tolist()
    assert wanted != sorted(wanted)
    for part, begin, end in (("a", 0, 3000), ("b", 3000, 5000)):
        np.array([[i, 50256] for i in range(begin, end)], "<u2").tofile(tmp_path / f"{part}.bin")
        np.save(tmp_path / f"{part}.npy", np.array([[2, 1, 2, 1]] * (end - begin)))
    counts = prepare_owt.join(tmp_path, [str(tmp_path / part) for part in "ab"], 200, 0.05, 50256)
    assert np.fromfile(tmp_path / "val.bin", "<u2")[::2].tolist() == wanted
    assert np.fromfile(tmp_path / "train.bin", "<u2")[::2].tolist() == sorted({*range(5000)} - {*wanted})
    assert [counts[which]["documents"] for which in ("train", "val")] == [4997, 3]


# --- what goes wrong


@pytest.fixture
def wrong(hub, tmp_path):
    """Repositories of a hub with which something is wrong."""
    (tmp_path / "script/refs-convert-parquet").mkdir(parents=True)
    (tmp_path / "script/script.py").write_text("")
    write_parquet(tmp_path / "two/a/train-0.parquet", ["x"])
    write_parquet(tmp_path / "two/b/train-0.parquet", ["x"])
    write_parquet(tmp_path / "other/train.parquet", ["x"], "story")
    write_parquet(tmp_path / "large/train.parquet", [[70_000]], "input_ids")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/train.parquet").write_bytes(b"PAR1 and no more")
    for name in ("script", "two", "other", "cut", "large"):
        hub.repos[f"datasets/org/{name}"] = tmp_path / name


@pytest.mark.parametrize("args, named", [
    (["--dataset=org/nothing"], "org/nothing"),
    (["--dataset=org/script"], "org/script"),
    (["--dataset=org/two"], "--folder=a (or b)"),
    (["--dataset=org/other"], "story, url with --column"),
    (["--dataset=org/other", "--without=Books3", "--column=story"], "--without"),
    (["--dataset=org/other", "--split=test"], "'test'"),
    (["--dataset=org/cut"], "train.parquet"),
    (["--dataset=org/large"], "70000"),
])
def test_what_goes_wrong_is_one_line(wrong, prepare, args, named):
    assert named in prepare(*args).error
    assert not os.path.exists("data") or os.listdir("data") == []


def test_one_of_several_folders_with_the_split_is_taken_when_it_is_named(wrong, prepare):
    assert prepare("--dataset=org/two", "--folder=b").code == 0


@pytest.mark.parametrize("args, repo", [  # owt is the default of models of GPT-2's vocabulary
    (["--dataset=pile"], "monology-pile-uncopyrighted-tokenizer-gpt2"),
    ([], "Skylion007/openwebtext"),
])
def test_eval_without_a_network_names_the_repository(tmp_path, monkeypatch, gpt2_tokenizer, args, repo):
    monkeypatch.chdir(tmp_path)
    save_random(vocab_size=50257, n_positions=64)
    assert repo in run_alone("eval.py", "--models=random", *args, env={"HF_HOME": str(tmp_path / "cache")}).error
