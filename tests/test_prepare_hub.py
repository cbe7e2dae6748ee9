"""
prepare_owt.py on rows, of local files and of a hub: text becomes nanoGPT's tokens, rows of ids are taken as documents
or windows, OpenWebText's layouts are found, and what goes wrong is one line.
"""
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import random_hf, read_json, read_tokens, run_alone
from tiny_hub import point_here, serve

import prepare_owt


def texts(n):
    """n documents of source code, of very different lengths, the first one empty."""
    source = Path(json.__file__).read_text()
    return [source[i : i + i**2 % 3000] for i in range(n)]


def nanogpt(docs):
    """What nanoGPT's prepare.py writes of the documents: encode_ordinary, end-of-text appended."""
    bpe = tiktoken.get_encoding("gpt2")
    return [token for doc in docs for token in [*bpe.encode_ordinary(doc), bpe.eot_token]]


def assert_every_200th_is_val(dataset, docs):
    assert tokens("train", dataset) == nanogpt(doc for i, doc in enumerate(docs) if i % 200)
    assert tokens("val", dataset) == nanogpt(docs[::200])


def write_parquet(path, docs, column="text", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: docs, "url": [""] * len(docs)} | more), path)


def tokens(split, dataset):
    return read_tokens(split, dataset).tolist()


@pytest.fixture
def hub(run, tmp_path, monkeypatch, gpt2_tokenizer):
    with serve({}) as server:
        point_here(server, monkeypatch, tmp_path / "cache")
        yield server


def fetched(hub):
    return [name for method, _, name, _ in hub.requests if method == "GET" and name.endswith(".parquet")]


# --- rows of text


def test_a_hub_dataset_is_nanogpts_tokens_with_every_200th_document_in_val(hub, run, tmp_path):
    """--tokens stops at the end of the document that reaches them, and files behind it are not fetched. A cached file
    of another size is fetched again."""
    docs = texts(900)
    for i in range(3):
        write_parquet(tmp_path / f"repo/data/train-0000{i}-of-00003.parquet", docs[300 * i : 300 * i + 300])
    write_parquet(tmp_path / "repo/data/test-00000-of-00001.parquet", ["not this"])
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    prepare = ["prepare_owt.py", "--dataset=org/stories", "--val_every=200"]
    assert run(*prepare, f"--tokens={len(nanogpt(docs[:412])) - 3}").code == 0
    assert_every_200th_is_val("stories", docs[:412])
    assert len(fetched(hub)) == 2

    for path in (tmp_path / "cache").rglob("*00001-of-00003.parquet"):
        os.truncate(path.resolve(), 100)
    assert run(*prepare, "--force").code == 0
    assert_every_200th_is_val("stories", docs)
    assert read_json("data/stories/meta.json")["train"]["documents"] == 895
    assert len(fetched(hub)) == 4


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv",
                                  "saved"])
def test_rows_of_every_format_are_the_same_tokens(run, gpt2_tokenizer, name):
    docs = texts(210)
    docs[7] = "NA"  # which is text in a .csv too
    table = pandas.DataFrame(dict(body=docs))
    if name == "saved":
        datasets.Dataset.from_pandas(table).save_to_disk(name, num_shards=3)
    elif name in ("a.parquet", "a.csv"):
        getattr(table, "to_" + name[2:])(name)
    else:
        table.to_json(name, orient="records", lines=name != "a.json")
    args = [f"--files={name}", "--column=body", "--tokenizer=gpt2", "--val_every=200"]
    assert run("prepare_owt.py", *args).code == 0
    assert_every_200th_is_val("files", docs)


def test_few_long_rows_are_cut_at_their_end_as_few_text_files_are(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n{"text": "short"}\n' % ("x" * 1_000_000))
    assert run("prepare_owt.py", "--files=a.jsonl").code == 0
    assert tokens("train", "files") == [*b"x" * 950_001, 256, *b"short", 256]
    assert tokens("val", "files") == [*b"x" * 49_999, 256]


# --- rows of token ids

IDS = {  # rows with end-of-text 1, and what they are found to be; None: it can't be known
    "documents": ([[5, 6, 7], [8, 9, 1], [], None, [10]], "documents"),
    "end-of-text first": ([[1, 5, 6], [1, 7], [1]], "documents"),
    "end-of-text at both ends": ([[1, 5, 6, 1], [1, 7, 1]], "documents"),
    "windows": ([[5, 1, 7]] * 4 + [[], None, [8, 9, 9]], "windows"),
    "windows and late remainders": ([*[[5, 1, 7]] * 1200, [8], *[[5, 6, 7]] * 9], "windows"),
    "documents cut to one length": ([[5, 6, 7]] * 4, None),
    "lengths of documents and end-of-text inside": ([[5, 1, 7, 8], [8], [5, 6]], None),
}


def as_document(ids):
    """One end-of-text goes to its end: that which is first or last, or else a new one."""
    ids = ids[1:] if ids[:1] == [1] else ids
    return ids if ids[-1:] == [1] else [*ids, 1]


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("row_type", ["", "documents", "windows"])
def test_rows_of_ids_are_documents_or_windows(run, tmp_path, kind, row_type):
    rows, found = IDS[kind]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:1", "--val_every=1", f"--rows={row_type}")
    found = row_type or found
    if found is None:
        assert "--rows=windows" in done.error
        return
    rows = [row or [] for row in rows]
    stream = rows if found == "windows" else [as_document(row) for row in rows]
    assert tokens("val", "files") == sum(stream, [])
    meta = read_json("data/files/meta.json")["val"]
    assert meta["documents"] == len(rows)
    unmarked = sum(not row or 1 not in (row[0], row[-1]) for row in rows)
    assert meta["eot_appended"] == (0 if found == "windows" else unmarked)


def test_padding_is_left_out_where_a_mask_says_so_and_the_share_of_end_of_text_is_said(run, tmp_path):
    rows, masks = [[9] * 4, [5, 6, 1, 1], [7, 1, 1, 1]], [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids", attention_mask=masks)
    args = ["--files=a.parquet", "--tokenizer=4096:1", "--rows=windows", "--val_every=100"]
    said = run("prepare_owt.py", *args).text
    assert tokens("train", "files") == [5, 6, 1, 1, 7]
    assert "40.000%" in said
    assert "1 of 2 doubled" in said


@pytest.mark.parametrize("tokenizer, taken", [("bytes", [*b"ab", 256]), ("4096:1", [7, 8, 1])])
def test_of_text_and_ids_the_tokenizer_takes_what_it_can(run, tmp_path, tokenizer, taken):
    write_parquet(tmp_path / "a.parquet", ["x", "ab"], input_ids=[[5], [7, 8]])
    assert run("prepare_owt.py", "--files=a.parquet", f"--tokenizer={tokenizer}", "--val_every=2").code == 0
    assert tokens("train", "files") == taken


@pytest.fixture
def random_model(run):
    """A model of GPT-2's vocabulary in random/."""
    random_hf(vocab_size=50257, n_positions=64, n_embd=16, n_head=2, n_layer=1).save_pretrained("random")


@pytest.mark.slow
def test_eval_prepares_the_pile_by_itself_all_of_it_to_evaluate_on(hub, run, tmp_path, random_model):
    """The tokenized Pile is fetched from the hub once; what is asked for of it is val."""
    sequences = np.random.default_rng(0).integers(0, 50256, (5, 257))
    sequences[:, 9] = 50256
    write_parquet(tmp_path / "repo/data/train-00000-of-00001.parquet", sequences.tolist(), "input_ids")
    hub.repos["datasets/apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"] = tmp_path / "repo"
    for _ in range(2):
        assert run("eval.py", "--models=random", "--dataset=pile").code == 0
    assert tokens("val", "pile") == sequences.flatten().tolist()
    assert tokens("train", "pile") == []
    assert len(fetched(hub)) == 1


def test_eval_without_a_network_names_the_repository(gpt2_tokenizer, random_model):
    """That of owt, the default of models of GPT-2's vocabulary."""
    assert "Skylion007/openwebtext" in run_alone("eval.py", "--models=random").error


# --- OpenWebText


@pytest.mark.parametrize("layout", ["plain_text", "refs-convert-parquet/plain_text/train",
                                    "refs-convert-parquet/plain_text/partial-train"])
def test_openwebtext_is_found_where_it_is_today(hub, run, tmp_path, layout):
    """Converted on main; or a loading script on main, and the parquet conversion beside it, whole or the first part."""
    docs = texts(250)
    write_parquet(tmp_path / "owt" / layout / "train-00000-of-00001.parquet", docs)
    (tmp_path / "owt/openwebtext.py").write_text("# a script that datasets no longer runs")
    hub.repos["datasets/Skylion007/openwebtext"] = tmp_path / "owt"
    done = run("prepare_owt.py", "--dataset=owt", "--tokens=1_000_000", "--val_every=200")
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
        np.save(tmp_path / f"{part}.npy", np.array([[2, 1, 2, 1, 0]] * (end - begin)))
    counts = prepare_owt.join(tmp_path, [str(tmp_path / part) for part in "ab"], 200, 0.05, 50256)
    assert np.fromfile(tmp_path / "val.bin", "<u2")[::2].tolist() == wanted
    assert np.fromfile(tmp_path / "train.bin", "<u2")[::2].tolist() == sorted({*range(5000)} - {*wanted})
    assert [counts[which]["documents"] for which in ("train", "val")] == [4997, 3]


def test_what_goes_wrong_is_one_line(hub, run, tmp_path):
    write_parquet(tmp_path / "two/a/train-0.parquet", ["x"])
    write_parquet(tmp_path / "two/b/train-0.parquet", ["x"])
    write_parquet(tmp_path / "other/train.parquet", ["x"], "story")
    for name in ("script/refs-convert-parquet", "cut", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "script/script.py").write_text("")
    (tmp_path / "cut/train.parquet").write_bytes(b"PAR1 and no more")
    hub.repos |= {f"datasets/org/{name}": tmp_path / name for name in ("script", "two", "other", "cut")}
    for args, named in [
        (["--dataset=org/nothing"], "org/nothing"),
        (["--dataset=org/script"], "org/script"),
        (["--dataset=org/two"], "--folder=a"),
        (["--dataset=org/other"], "--column"),
        (["--dataset=org/other", "--split=test"], "test"),
        (["--dataset=org/cut"], "train.parquet"),
    ]:
        assert named in run("prepare_owt.py", *args).error
        assert os.listdir("data") == [], args
    assert run("prepare_owt.py", "--dataset=org/two", "--folder=b").code == 0
