"""
prepare_owt.py on rows: a hub's parquet and jsonl files and OpenWebText's layouts become nanoGPT's tokens, a
killed run resumes to the same bytes, and what goes wrong is said in one line.
"""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import REPO, random_hf, read_json, read_tokens, run_alone
from tiny_hub import serve

import prepare_owt
from parts import preparation


def texts(n):
    """n documents of source code, of very different lengths, one empty."""
    with open(json.__file__) as f:
        source = f.read()
    rng = np.random.default_rng(0)
    docs = []
    for i, length in zip(rng.integers(0, 5000, n), rng.integers(1, 3000, n)):
        docs.append(source[i : i + length])
    docs[n // 2] = ""
    return docs


def without_every_200th(docs):
    return [doc for i, doc in enumerate(docs) if i % 200]


def nanogpt(docs):
    """What nanoGPT's prepare.py writes of the documents: encode_ordinary, end-of-text appended."""
    bpe = tiktoken.get_encoding("gpt2")
    return [token for doc in docs for token in [*bpe.encode_ordinary(doc), bpe.eot_token]]


def write_parquet(path, docs, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: docs, "url": [""] * len(docs)}), path)


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


# --- rows of text


def test_a_hub_dataset_is_nanogpts_tokens_with_every_200th_document_in_val(hub, prepare, tmp_path):
    docs = texts(450)
    write_parquet(tmp_path / "repo/data/train-00000-of-00002.parquet", docs[:300])
    write_parquet(tmp_path / "repo/data/train-00001-of-00002.parquet", docs[300:])
    write_parquet(tmp_path / "repo/data/test-00000-of-00001.parquet", ["not this"])
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    done = prepare("--dataset=org/stories", "--val_every=200")
    assert done.code == 0, done.text
    assert tokens("train", "stories") == nanogpt(without_every_200th(docs))
    assert tokens("val", "stories") == nanogpt(docs[::200])
    assert read_json("data/stories/meta.json")["train"]["documents"] == 447


def test_tokens_stops_early_at_a_documents_end(hub, prepare, tmp_path):
    docs = texts(3000)
    write_parquet(tmp_path / "repo/train.parquet", docs)
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    done = prepare("--dataset=org/stories", "--tokens=100_000", "--val_every=200")
    assert done.code == 0, done.text
    train = tokens("train", "stories")
    assert 100_000 <= len(train) + len(tokens("val", "stories")) < 600_000
    assert train == nanogpt(without_every_200th(docs))[: len(train)]
    assert train[-1] == 50256


def test_local_jsonl_and_parquet_rows(run, tmp_path, gpt2_tokenizer):
    docs = texts(210)
    with open(tmp_path / "a.jsonl", "w") as f:
        for doc in docs[:100]:
            f.write(json.dumps({"body": doc}) + "\n")
    write_parquet(tmp_path / "b.parquet", docs[100:], "body")
    args = ["--files=a.jsonl,b.parquet", "--column=body", "--tokenizer=gpt2", "--dataset=rows", "--val_every=200"]
    done = run("prepare_owt.py", *args)
    assert done.code == 0, done.text
    assert tokens("train", "rows") == nanogpt(without_every_200th(docs))


@pytest.mark.parametrize("kind", [
    "parquet",
    "jsonl",
])
def test_subsets_of_the_pile_are_left_out_by_name(prepare, kind):
    docs = texts(400)
    names = ["Pile-CC", "Books3", "Github", "OpenWebText2"] * 100
    metas = [dict(pile_set_name=name) for name in names]
    if kind == "jsonl":
        with open("pile.jsonl", "w") as f:
            for doc, meta in zip(docs, metas):
                f.write(json.dumps(dict(text=doc, meta=meta)) + "\n")
    else:
        table = {"text": docs, "meta": [json.dumps(meta) for meta in metas]}
        pq.write_table(pa.table(table), "pile.parquet")
    args = ["--dataset=pile_text", f"--files=pile.{kind}", "--tokenizer=gpt2", "--val_every=200"]
    done = prepare(*args, "--without=OpenWebText2,Books3,BookCorpus2")
    assert done.code == 0, done.text
    kept = docs[::2]
    assert tokens("val", "pile_text") == nanogpt(kept[::200])
    assert tokens("train", "pile_text") == nanogpt(without_every_200th(kept))


def test_subsets_of_rows_without_their_names_can_not_be_left_out(prepare, tmp_path):
    write_parquet(tmp_path / "plain.parquet", texts(400))
    refused = prepare("--dataset=plain", "--files=plain.parquet", "--tokenizer=gpt2", "--without=Books3")
    assert "--without needs a column meta" in refused.error


# --- rows of token ids


def test_rows_that_are_tokens_already_are_taken_as_they_are(hub, prepare, tmp_path):
    rows = [[i, i + 1, 50256, 7] for i in range(400)]
    write_parquet(tmp_path / "repo/data/train-0.parquet", rows, "input_ids")
    hub.repos["datasets/org/tokenized"] = tmp_path / "repo"
    done = prepare("--dataset=org/tokenized", "--val_every=200")
    assert done.code == 0, done.text
    assert tokens("val", "tokenized") == rows[0] + rows[200]
    assert tokens("train", "tokenized") == sum(without_every_200th(rows), [])


def test_documents_as_rows_of_ids_get_the_end_of_text_that_they_lack(run, tmp_path):
    """An empty document too; the ends that were put there are counted."""
    rows = [[5, 6, 7], [8, 9, 1], [], None, [10]]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:1", "--dataset=own", "--val_every=5")
    assert done.code == 0, done.text
    assert tokens("val", "own") == [5, 6, 7, 1]
    assert tokens("train", "own") == [8, 9, 1, 1, 1, 10, 1]
    meta = read_json("data/own/meta.json")
    assert [meta[split]["documents"] for split in ("train", "val")] == [4, 1]
    assert [meta[split]["eot_appended"] for split in ("train", "val")] == [3, 1]


def test_windows_may_have_empty_rows_between_but_no_documents(run, tmp_path):
    windows = [[5, 6, 7]] * 4
    write_parquet(tmp_path / "a.parquet", [*windows, [], None, *windows], "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:1", "--dataset=own", "--val_every=100")
    assert done.code == 0, done.text
    assert tokens("val", "own") + tokens("train", "own") == [5, 6, 7] * 8
    write_parquet(tmp_path / "b.parquet", [*windows * 300, [8, 9], *windows], "input_ids")
    done = run("prepare_owt.py", "--files=b.parquet", "--tokenizer=4096:1", "--dataset=both")
    assert "row 1201 has 2 ids, and those before it 3 each: are they windows of a stream, or documents?" in done.error


@pytest.mark.parametrize("tokenizer, taken", [
    ("bytes", [*b"ab", 256]),
    ("4096:1", [7, 8, 1]),
])
def test_of_text_and_ids_the_tokenizer_takes_what_it_can(run, tmp_path, tokenizer, taken):
    pq.write_table(pa.table({"text": ["x", "ab"], "input_ids": [[5], [7, 8]]}), tmp_path / "a.parquet")
    done = run("prepare_owt.py", "--files=a.parquet", f"--tokenizer={tokenizer}", "--dataset=own")
    assert done.code == 0, done.text
    assert tokens("train", "own") == taken


def test_rows_of_another_tokenizers_ids(run, tmp_path):
    """A model of its own vocabulary, of 4,096 tokens with the last one as end-of-text, trains on them."""
    rows = [[5, 4000, i % 50, 4095] * 4 for i in range(400)]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:4095", "--dataset=own", "--val_every=200")
    assert done.code == 0, done.text
    assert tokens("val", "own") == rows[0] + rows[200]
    assert len(tokens("train", "own")) == 398 * 16
    meta = read_json("data/own/meta.json")
    assert (meta["vocab_size"], meta["eot"]) == (4096, 4095)

    save_random(vocab_size=4096, n_positions=16)
    short = ["--max_iters=2", "--block_size=16", "--compile=False", "--eval_iters=1", "--batch_size=2"]
    done = run("train.py", "--init_from=random", "--dataset=own", *short)
    assert done.code == 0, done.text
    assert "was it trained on such tokens" not in done.text


def test_eval_prepares_the_pile_by_itself_all_of_it_to_evaluate_on(hub, tmp_path):
    """The tokenized Pile is fetched from the hub once; what is asked for of it is val."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50257, 512).tolist() for _ in range(10)]
    (tmp_path / "repo/data").mkdir(parents=True)
    pq.write_table(pa.table({"input_ids": sequences}), tmp_path / "repo/data/train-00000-of-00001.parquet")
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
    fetched = [name for method, _, name, _ in hub.requests if method == "GET" and name.endswith(".parquet")]
    assert len(fetched) == 1


# owt is the default of models of GPT-2's vocabulary
@pytest.mark.parametrize("args, repo", [
    (["--dataset=pile"], "monology-pile-uncopyrighted-tokenizer-gpt2"),
    ([], "Skylion007/openwebtext"),
])
def test_eval_without_a_network_says_what_to_do(tmp_path, monkeypatch, gpt2_tokenizer, args, repo):
    monkeypatch.chdir(tmp_path)
    save_random(vocab_size=50257, n_positions=64)
    refused = run_alone("eval.py", "--models=random", *args, env={"HF_HOME": str(tmp_path / "cache")})
    assert repo + " can't be listed" in refused.error
    assert "bring its files here and run with --files='*.parquet'" in refused.error


# --- OpenWebText


@pytest.mark.parametrize("layout", [
    "main",
    "refs-convert-parquet/plain_text/train",
    "refs-convert-parquet/plain_text/partial-train",
])
def test_openwebtext_is_found_where_it_is_today(hub, prepare, tmp_path, layout):
    """Converted on main; or a loading script on main, and the parquet conversion beside it, whole or the
    first part."""
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
    assert "this is a part of OpenWebText: 250 of 8,013,769 documents" in done.text


def test_all_of_openwebtext_has_nanogpts_val_split():
    """Against datasets.train_test_split itself, at the corpus's size: indices stand for documents."""
    from datasets import Dataset

    indices = Dataset.from_dict({"i": range(200_000)})
    theirs = indices.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare_owt.nanogpt_val_documents(200_000).tolist() == theirs["test"]["i"]
    assert len(prepare_owt.nanogpt_val_documents()) == 4007  # as nanoGPT's README counts


def test_val_is_put_into_nanogpts_order(tmp_path, monkeypatch, gpt2_tokenizer):
    """A corpus of 5,000 documents in OpenWebText's place."""
    monkeypatch.setattr(prepare_owt.nanogpt_val_documents, "__defaults__", (5000,))
    wanted = prepare_owt.nanogpt_val_documents().tolist()
    assert wanted != sorted(wanted)
    in_order = nanogpt(map(str, sorted(wanted)))
    np.array(in_order, dtype="<u2").tofile(tmp_path / "val.bin")
    prepare_owt.order_val_as_nanogpt(tmp_path, 50256)
    assert np.fromfile(tmp_path / "val_ordered.bin", "<u2").tolist() == nanogpt(map(str, wanted))


# --- interruptions


# prepare_owt.py on a slow disk, with a clock that runs so fast that it notes its progress after every batch
SLOW = f"""
import sys, time
sys.path.insert(0, {REPO!r})
import prepare_owt
real = prepare_owt.next_batch
def slow(tasks):
    time.sleep(0.05)
    return real(tasks)
prepare_owt.next_batch = slow
prepare_owt.time.monotonic = iter(range(0, 10**9, 20)).__next__
prepare_owt.main()
"""


@pytest.mark.parametrize("kind, args", [
    (signal.SIGKILL, ["--files=a.parquet,b.parquet"]),
    (signal.SIGTERM, ["--files=a.parquet,b.parquet"]),
    (signal.SIGKILL, ["--files=c.txt"]),
    (signal.SIGKILL, ["--files=c.txt", "--tokens=1000"]),
])
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch, gpt2_tokenizer, kind, args):
    """Of a text file all is taken, whatever --tokens says."""
    monkeypatch.chdir(tmp_path)
    docs = texts(10_000)
    write_parquet(tmp_path / "a.parquet", docs[:6_000])
    write_parquet(tmp_path / "b.parquet", docs[6_000:])
    (tmp_path / "c.txt").write_text("\n".join(docs))

    args = [*args, "--tokenizer=gpt2", "--val_every=200"]
    command = [sys.executable, "-c", SLOW, *args, "--dataset=cut"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if os.path.exists("data/cut.tmp/val.bin") and os.path.getsize("data/cut.tmp/train.bin") > 2_000_000:
            break
        time.sleep(0.02)
    process.send_signal(kind)
    text = process.communicate()[0]
    assert process.returncode != 0
    assert not os.path.exists("data/cut")
    if kind == signal.SIGTERM:
        assert "run the same command to resume" in text
        assert "Traceback" not in text
    noted = preparation.written(read_json("data/cut.tmp/progress.json"))
    assert 0 < noted < 5_000_000

    resumed = run_alone("prepare_owt.py", *args, "--dataset=cut")
    assert resumed.code == 0, resumed.text
    assert f"resuming after {noted:,} tokens" in resumed.text
    in_one_go = run_alone("prepare_owt.py", *args, "--dataset=whole")
    assert in_one_go.code == 0, in_one_go.text
    assert f"resuming after {noted:,} tokens" not in in_one_go.text

    train, val = tokens("train", "cut"), tokens("val", "cut")
    assert train == tokens("train", "whole")
    assert val == tokens("val", "whole")
    if "--files=c.txt" in args:
        assert train[:-1] + val == nanogpt(["\n".join(docs)])
    else:
        assert train == nanogpt(without_every_200th(docs))
    assert sorted(os.listdir("data")) == ["cut", "whole"]


# --- what goes wrong


@pytest.fixture
def wrong(hub, tmp_path):
    """Repositories of a hub with which something is wrong."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("")
    (tmp_path / "script/refs-convert-parquet").mkdir()
    write_parquet(tmp_path / "two/a/train-0.parquet", ["x"])
    write_parquet(tmp_path / "two/b/train-0.parquet", ["x"])
    write_parquet(tmp_path / "other/train.parquet", ["x"], "story")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/train.parquet").write_bytes(b"PAR1 and no more")
    write_parquet(tmp_path / "large/train.parquet", [[70_000]], "input_ids")
    for name in ("script", "two", "other", "cut", "large"):
        hub.repos[f"datasets/org/{name}"] = tmp_path / name


@pytest.mark.parametrize("args, message", [
    (["--dataset=org/nothing"], "org/nothing can't be listed"),
    (["--dataset=org/script"], "org/script has no .parquet or"),
    (["--dataset=org/two"], "choose one with --folder=a (or b)"),
    (["--dataset=org/other"], "no column 'text': choose one of story, url with --column"),
    (["--dataset=org/other", "--split=test"], "of the split 'test'"),
    (["--dataset=org/cut"], "train.parquet can't be read: Parquet magic bytes not found"),
    (["--dataset=org/large"], "holds token ids from 70000 to 70000, but the tokenizer has 50257"),
    (["--dataset=org/other", "--tokens=1_000_000_000_000_000"], "are free: ask for less with --tokens"),
])
def test_what_goes_wrong_is_said_in_one_line(wrong, prepare, args, message):
    assert message in prepare(*args).error
    assert not os.path.exists("data") or os.listdir("data") == []


def test_one_of_several_folders_with_the_split_is_taken_when_it_is_named(wrong, prepare):
    done = prepare("--dataset=org/two", "--folder=b")
    assert done.code == 0, done.text


@pytest.mark.parametrize("name, content, problem", [
    ("empty.jsonl", "", "it has no rows"),
    ("bad.jsonl", '{"text": "good"}\n{"text": bad\n', "JSON parse error"),
])
def test_a_jsonl_file_that_can_not_be_read_is_named(prepare, tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    refused = prepare(f"--files={name}", "--dataset=bad")
    assert f"{name} can't be read: {problem}" in refused.error
