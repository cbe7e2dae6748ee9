"""prepare_owt.py on rows: a hub's parquet and jsonl files, OpenWebText's layouts, resuming, and what goes wrong."""
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
from conftest import REPO, random_hf
from tiny_hub import serve

import prepare_owt


def texts(n, seed=0):
    """n documents of source code, of very different lengths, one empty."""
    with open(json.__file__) as f:
        source = f.read()
    rng = np.random.default_rng(seed)
    docs = [source[i : i + length] for i, length in zip(rng.integers(0, 5000, n), rng.integers(1, 3000, n))]
    docs[n // 2] = ""
    return docs


def nanogpt(docs):
    """What nanoGPT's prepare.py writes of the documents: encode_ordinary, end-of-text appended."""
    bpe = tiktoken.get_encoding("gpt2")
    return [token for doc in docs for token in [*bpe.encode_ordinary(doc), bpe.eot_token]]


def write_parquet(path, docs, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: docs, "url": [""] * len(docs)}), path)


def read(split, name):
    return np.fromfile(f"data/{name}/{split}.bin", dtype="<u2").tolist()


@pytest.fixture
def hub(tmp_path, monkeypatch, gpt2_tokenizer):
    monkeypatch.chdir(tmp_path)
    with serve({}) as server:
        yield server


@pytest.fixture
def prepare(hub, tmp_path):
    def prepare(*args):
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache")}
        return subprocess.run([sys.executable, os.path.join(REPO, "prepare_owt.py"), *args], env=env, capture_output=True, text=True)

    return prepare


def test_a_hub_dataset_is_nanogpts_tokens_with_every_200th_document_in_val(hub, prepare, tmp_path):
    docs = texts(450)
    write_parquet(tmp_path / "repo/data/train-00000-of-00002.parquet", docs[:300])
    write_parquet(tmp_path / "repo/data/train-00001-of-00002.parquet", docs[300:])
    write_parquet(tmp_path / "repo/data/test-00000-of-00001.parquet", ["not this"])
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    done = prepare("--dataset=org/stories")
    assert done.returncode == 0, done.stderr
    assert read("train", "stories") == nanogpt([doc for i, doc in enumerate(docs) if i % 200])
    assert read("val", "stories") == nanogpt(docs[::200])
    assert json.load(open("data/stories/meta.json"))["train"]["documents"] == 447


def test_eval_prepares_the_pile_by_itself_all_of_it_to_evaluate_on(hub, prepare, tmp_path):
    """The tokenized Pile is fetched from the hub once; what is asked for of it is val."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 50257, 512).tolist() for _ in range(40)]
    (tmp_path / "repo/data").mkdir(parents=True)
    pq.write_table(pa.table({"input_ids": sequences}), tmp_path / "repo/data/train-00000-of-00001.parquet")
    hub.repos["datasets/apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2"] = tmp_path / "repo"
    random_hf(vocab_size=50257, n_positions=64, n_embd=16, n_head=2, n_layer=1).save_pretrained("random")
    for _ in range(2):
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, os.path.join(REPO, "eval.py"), "--models=random", "--dataset=pile", "--json=r.json"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read("val", "pile") == [token for ids in sequences for token in ids] and read("train", "pile") == []
    (row,) = json.load(open("r.json"))["rows"]
    assert row["windows"] == (40 * 512 - 1) // 64 and 10 < row["loss"] < 13
    assert len([r for r in hub.requests if r[0] == "GET" and r[2].endswith(".parquet")]) == 1


def test_eval_without_a_network_says_what_to_do(hub, tmp_path):
    random_hf(vocab_size=50257, n_positions=64, n_embd=16, n_head=2, n_layer=1).save_pretrained("random")
    for args, repo in (["--dataset=pile"], "monology-pile-uncopyrighted-tokenizer-gpt2"), ([], "Skylion007/openwebtext"):  # of GPT-2's vocabulary: owt
        done = subprocess.run([sys.executable, os.path.join(REPO, "eval.py"), "--models=random", *args], env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr and repo + " can't be listed" in done.stderr
    assert "bring its files here and run with --files='*.parquet'" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_subsets_of_the_pile_are_left_out_by_name(hub, prepare, tmp_path, as_json):
    docs, names = texts(400), ["Pile-CC", "Books3", "Github", "OpenWebText2"] * 100
    metas = [dict(pile_set_name=name) for name in names]
    if as_json:
        with open("pile.jsonl", "w") as f:
            f.writelines(json.dumps(dict(text=doc, meta=meta)) + "\n" for doc, meta in zip(docs, metas))
    else:
        pq.write_table(pa.table({"text": docs, "meta": [json.dumps(meta) for meta in metas]}), "pile.parquet")
    done = prepare("--dataset=pile_text", f"--files=pile.{'jsonl' if as_json else 'parquet'}", "--tokenizer=gpt2", "--without=OpenWebText2,Books3,BookCorpus2")
    assert done.returncode == 0, done.stderr
    kept = docs[::2]
    assert read("val", "pile_text") == nanogpt(kept[::200]) and read("train", "pile_text") == nanogpt([d for i, d in enumerate(kept) if i % 200])
    write_parquet(tmp_path / "plain.parquet", docs)
    done = prepare("--dataset=plain", "--files=plain.parquet", "--tokenizer=gpt2", "--without=Books3")
    assert done.returncode == 1 and "--without needs a column meta" in done.stderr and "Traceback" not in done.stderr


def test_tokens_stops_early_at_a_documents_end(hub, prepare, tmp_path):
    docs = texts(3000)
    write_parquet(tmp_path / "repo/train.parquet", docs)
    hub.repos["datasets/org/stories"] = tmp_path / "repo"
    assert prepare("--dataset=org/stories", "--tokens=100_000").returncode == 0
    train = read("train", "stories")
    assert 100_000 <= len(train) + len(read("val", "stories")) < 600_000
    assert train == nanogpt([doc for i, doc in enumerate(docs) if i % 200])[: len(train)] and train[-1] == 50256


@pytest.mark.parametrize("layout", ["main", "refs-convert-parquet/plain_text/train", "refs-convert-parquet/plain_text/partial-train"])
def test_openwebtext_is_found_where_it_is_today(hub, prepare, tmp_path, layout):
    """Converted on main; or a loading script on main, and the parquet conversion beside it, whole or the first part."""
    docs = texts(250)
    if layout == "main":
        write_parquet(tmp_path / "owt/plain_text/train-00000-of-00001.parquet", docs)
    else:
        write_parquet(tmp_path / "owt" / layout / "0000.parquet", docs)
        (tmp_path / "owt/openwebtext.py").write_text("# a script that datasets no longer runs")
    hub.repos["datasets/Skylion007/openwebtext"] = tmp_path / "owt"
    done = prepare("--dataset=owt", "--tokens=1_000_000")
    assert done.returncode == 0, done.stderr
    assert read("val", "owt") == nanogpt([docs[0], docs[200]])
    assert "this is a part of OpenWebText: 250 of 8,013,769 documents" in done.stdout


def test_all_of_openwebtext_has_nanogpts_val_split(monkeypatch, gpt2_tokenizer):
    """Against datasets.train_test_split itself, at the corpus's size: indices stand for documents."""
    from datasets import Dataset

    theirs = Dataset.from_dict({"i": range(200_000)}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert prepare_owt.nanogpt_val_documents(200_000).tolist() == theirs["test"]["i"]
    assert len(prepare_owt.nanogpt_val_documents()) == 4007  # as nanoGPT's README counts


def test_val_is_put_into_nanogpts_order(run, tmp_path, monkeypatch, gpt2_tokenizer):
    """A corpus of 5,000 documents in OpenWebText's place."""
    monkeypatch.setattr(prepare_owt, "OWT_DOCUMENTS", 5000)
    monkeypatch.setattr(prepare_owt.nanogpt_val_documents, "__defaults__", (5000,))
    wanted = prepare_owt.nanogpt_val_documents().tolist()
    assert wanted != sorted(wanted)
    in_order = [nanogpt([str(i)]) for i in sorted(wanted)]
    np.array(sum(in_order, []), dtype="<u2").tofile(tmp_path / "val.bin")
    prepare_owt.order_val_as_nanogpt(tmp_path, 50256)
    assert np.fromfile(tmp_path / "val_ordered.bin", "<u2").tolist() == nanogpt(map(str, wanted))


def test_rows_that_are_tokens_already_are_taken_as_they_are(hub, prepare, tmp_path):
    rows = [[i, i + 1, 50256, 7] for i in range(400)]
    write_parquet(tmp_path / "repo/data/train-0.parquet", rows, "input_ids")
    hub.repos["datasets/org/tokenized"] = tmp_path / "repo"
    assert prepare("--dataset=org/tokenized").returncode == 0
    assert read("val", "tokenized") == rows[0] + rows[200]
    assert read("train", "tokenized") == sum((row for i, row in enumerate(rows) if i % 200), [])


def test_rows_of_another_tokenizers_ids(run, tmp_path):
    """A model of its own vocabulary, say of 4,096 tokens with the last one as end-of-text, trains on them."""
    rows = [[5, 4000, i % 50, 4095] * 4 for i in range(400)]
    write_parquet(tmp_path / "a.parquet", rows, "input_ids")
    done = run("prepare_owt.py", "--files=a.parquet", "--tokenizer=4096:4095", "--dataset=own")
    assert done.code == 0, done.text
    assert read("val", "own") == rows[0] + rows[200] and len(read("train", "own")) == 398 * 16
    meta = json.load(open("data/own/meta.json"))
    assert (meta["vocab_size"], meta["eot"]) == (4096, 4095)
    random_hf(vocab_size=4096, n_positions=16, n_embd=16, n_head=2, n_layer=1).save_pretrained("random")
    done = run("train.py", "--init_from=random", "--dataset=own", "--max_iters=2", "--block_size=16", "--compile=False", "--eval_iters=1", "--batch_size=2")
    assert done.code == 0 and "was it trained on such tokens" not in done.text, done.text


def test_local_jsonl_and_parquet_rows(run, tmp_path, gpt2_tokenizer):
    docs = texts(210)
    with open(tmp_path / "a.jsonl", "w") as f:
        f.writelines(json.dumps({"body": doc}) + "\n" for doc in docs[:100])
    write_parquet(tmp_path / "b.parquet", docs[100:], "body")
    done = run("prepare_owt.py", "--files=a.jsonl,b.parquet", "--column=body", "--tokenizer=gpt2", "--dataset=rows")
    assert done.code == 0, done.text
    assert read("train", "rows") == nanogpt([doc for i, doc in enumerate(docs) if i % 200])


@pytest.mark.parametrize("kind, files", [(signal.SIGKILL, "a.parquet,b.parquet"), (signal.SIGTERM, "a.parquet,b.parquet"), (signal.SIGKILL, "c.txt")])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, gpt2_tokenizer, kind, files):
    monkeypatch.chdir(tmp_path)
    docs = texts(20_000)
    write_parquet(tmp_path / "a.parquet", docs[:12_000])
    write_parquet(tmp_path / "b.parquet", docs[12_000:])
    (tmp_path / "c.txt").write_text("\n".join(docs))
    slow = f"""
import sys, time
sys.path.insert(0, {REPO!r})
import prepare_owt
prepare_owt.time.monotonic = iter(range(0, 10**9, 20)).__next__  # a note after every piece
real = prepare_owt.pieces
prepare_owt.pieces = lambda *args: (time.sleep(0.05) or piece for piece in real(*args))
sys.argv = ["prepare_owt.py", "--files={files}", "--tokenizer=gpt2", "--dataset=cut"]
prepare_owt.main()
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(6000):
        if os.path.exists("data/cut.tmp/val.bin") and os.path.getsize("data/cut.tmp/train.bin") > 4_000_000:
            break
        time.sleep(0.02)
    process.send_signal(kind)
    text = process.communicate()[0]
    assert process.returncode != 0 and not os.path.exists("data/cut")
    if kind == signal.SIGTERM:
        assert "run the same command to go on" in text and "Traceback" not in text
    noted = prepare_owt.written(json.load(open("data/cut.tmp/progress.json")))
    assert 0 < noted < 10_000_000
    for name in ("cut", "whole"):
        done = subprocess.run([sys.executable, os.path.join(REPO, "prepare_owt.py"), f"--files={files}", "--tokenizer=gpt2", f"--dataset={name}"],
                              capture_output=True, text=True)
        assert done.returncode == 0 and (f"going on behind {noted:,} tokens" in done.stdout) == (name == "cut")
    train, val = (read(split, "cut") for split in ("train", "val"))
    assert (train, val) == (read("train", "whole"), read("val", "whole"))
    if files == "c.txt":
        assert train[:-1] + val == nanogpt(["\n".join(docs)])
    else:
        assert train == nanogpt([doc for i, doc in enumerate(docs) if i % 200])
    assert sorted(os.listdir("data")) == ["cut", "whole"]


def test_what_goes_wrong_is_said_in_one_line(hub, prepare, tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("")
    (tmp_path / "script/refs-convert-parquet").mkdir()
    write_parquet(tmp_path / "two/a/train-0.parquet", ["x"])
    write_parquet(tmp_path / "two/b/train-0.parquet", ["x"])
    write_parquet(tmp_path / "other/train.parquet", ["x"], "story")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/train.parquet").write_bytes(b"PAR1 and no more")
    write_parquet(tmp_path / "large/train.parquet", [[70_000]], "input_ids")
    hub.repos |= {f"datasets/org/{name}": tmp_path / name for name in ("script", "two", "other", "cut", "large")}
    for args, message in {
        ("--dataset=org/nothing",): "org/nothing can't be listed", ("--dataset=org/script",): "org/script has no .parquet or",
        ("--dataset=org/two",): "choose one with --folder=a (or b)", ("--dataset=org/other",): "no column 'text': choose one of story, url with --column",
        ("--dataset=org/other", "--split=test"): "of the split 'test'", ("--dataset=org/cut",): "train.parquet can't be read: Parquet magic bytes not found", ("--dataset=org/large",): "holds token ids from 70000 to 70000, but the tokenizer has 50257",
        ("--dataset=org/other", "--tokens=1_000_000_000_000_000"): "are free: ask for less with --tokens",
    }.items():
        done = prepare(*args)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and message in lines[-1] and "Traceback" not in done.stderr, (args, done.stderr)
    assert not os.path.exists("data") or os.listdir("data") == []
    assert prepare("--dataset=org/two", "--folder=b").returncode == 0
    (tmp_path / "empty.jsonl").write_text("")
    done = prepare("--files=empty.jsonl", "--dataset=bad")
    assert done.returncode == 1 and "empty.jsonl can't be read" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad\n')
    done = prepare("--files=bad.jsonl", "--dataset=bad")
    assert done.returncode == 1 and "bad.jsonl can't be read" in done.stderr and "Traceback" not in done.stderr
