"""
Text to tokens, once: data/NAME/{train,val}.bin (uint16) and meta.json.

    python prepare_owt.py                                                       # stdlib: this Python's own source, as bytes
    python prepare_owt.py --dataset=mytext --files='a.txt,dir/*.md'             # local text files, as bytes
    python prepare_owt.py --dataset=mytext --files='*.jsonl' --tokenizer=gpt2   # or rows of local .jsonl and .parquet files
    python prepare_owt.py --dataset=owt                                         # OpenWebText, all of it, nanoGPT's val split
    python prepare_owt.py --dataset=owt --tokens=600_000_000                    # its first 0.6 B tokens, enough for a fine-tune
    python prepare_owt.py --dataset=ORG/NAME --column=text --split=train        # any hub dataset; a column of lists holds token ids
    python prepare_owt.py --dataset=ORG/NAME --tokenizer=4096:1                 # of another vocabulary: 4,096 ids, end-of-text 1

Each document is followed by the end-of-text id. val is: of whole text files about 5 %, by a hash of their path (of few, the last
5 % of each); of rows every 200th; of all of OpenWebText nanoGPT's. Run it again after an interruption, and it goes on.
"""
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import numpy as np
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

from configurator import configure, one_line_errors
from files import TOKEN_FILES, check_folder, remove_files

# -----------------------------------------------------------------------------
dataset = ""  # stdlib (the default), owt, pile, pile-filtered, a hub repository (ORG/NAME or ORG/NAME@REVISION), or with --files a name of your own
files = ""  # comma-separated paths and patterns of local files: text, .jsonl or .parquet
tokenizer = ""  # bytes (end-of-text 256), gpt2 (50256) or, for rows of other token ids, VOCAB_SIZE:EOT; by default gpt2 for the hub, else bytes
tokens = 0  # stop after so many, behind a whole row or text file; 0: take all
column = ""  # of rows: the text, or lists of token ids; by default text, or input_ids where there is no text
split = "train"  # of a hub dataset: which files
folder = ""  # of a hub dataset: only files below this folder, where several hold the split
val_every = 200  # of rows, every so many-th is val; 1: all that there is, to evaluate on
without = ""  # comma-separated subsets of the Pile to drop, by a row's meta: the published filtered Pile is without OpenWebText2,Books3,BookCorpus2
force = False  # prepare again what is prepared already
# -----------------------------------------------------------------------------

HUB = {"owt": "Skylion007/openwebtext", "pile": "apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2",
       "pile-filtered": "lucabaroni/apollo-pile-filtered-10k"}
OWT_DOCUMENTS = 8_013_769
ROWS = (".parquet", ".jsonl", ".jsonl.gz", ".json")  # files whose rows are documents
VAL_SHARE = 0.05  # of whole text files
PIECE = 1_000_000  # characters that a worker takes at a time
# Where a text can be cut without a change to its tokens: GPT-2's have no white space behind something else, but for \xa0.
HALF_FILES = (*TOKEN_FILES, "progress.json", "progress.json.tmp", "val_ordered.bin")  # of an unfinished preparation
SEAM = re.compile(rb"[^\s\xa0](?=[ \t\n\r])")


# --- sources: [(name, path or a function that fetches it, bytes)]


def stdlib_files():
    """The standard library's .py files, without tests, installed packages and caches, sorted by name."""
    root = sysconfig.get_path("stdlib")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for below, folders, names in os.walk(root):
        folders[:] = [d for d in folders if d not in skip]
        for path in (os.path.join(below, n) for n in names if n.endswith(".py")):
            found.append((os.path.relpath(path, root).replace(os.sep, "/"), path, os.path.getsize(path)))
    return sorted(found)


def local_files(patterns):
    """The files that the comma-separated patterns match, sorted; ValueError if one matches none."""
    found = set()
    for pattern in filter(None, patterns.split(",")):
        paths = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not paths:
            raise ValueError(f"--files: no file matches {pattern!r}")
        found.update(paths)
    return [(path, path, os.path.getsize(path)) for path in sorted(found)]


def hub_files(repo):
    """A hub dataset's files of the split, in their order; from the hub's parquet conversion where the repository itself holds
    none that `datasets` still reads (it dropped loading scripts). OSError or ValueError, one line."""
    import huggingface_hub as hub

    repo, _, revision = repo.partition("@")

    def matching(revision, split_pattern):
        found = [f for f in hub.HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset") if hasattr(f, "size")]
        rows = sorted((f for f in found if f.path.endswith(ROWS) and f.path.startswith(folder)), key=lambda f: f.path)
        return rows, [f for f in rows if re.search(split_pattern, f.path)]

    try:
        rows, found = matching(revision or "main", rf"(^|[/_.-]){split}([/_.-]|$)")
        if not rows and not revision:
            revision = "refs/convert/parquet"
            rows, found = matching(revision, rf"/(partial-)?{split}/")
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, hub.errors.OfflineModeIsEnabled, OSError) as e:
        raise OSError(f"{repo} can't be listed on {hub.constants.ENDPOINT}: {type(e).__name__}: {str(e).splitlines()[0]}; without a network, "
                      "bring its files here and run with --files='*.parquet' --tokenizer=gpt2 --dataset=NAME") from None
    found = found or (rows if split == "train" else [])
    if not found:
        raise ValueError(f"{repo} has no {' or '.join(ROWS)} file of the split {split!r}" + (f" below {folder!r}" if folder else ""))
    folders = sorted({os.path.dirname(f.path).replace("/partial-" + split, "").replace("/" + split, "") for f in found})
    if len(folders) > 1:
        raise ValueError(f"{repo} has the split {split!r} in several folders: choose one with --folder={folders[0]} (or {', '.join(folders[1:5])})")

    def fetch(path):
        return lambda: hub.hf_hub_download(repo, path, revision=revision or "main", repo_type="dataset")

    return [(f.path, fetch(f.path), f.size) for f in found]


# --- documents


def rows_of(path, skip):
    """Yields (document, rows so far, share of the file read) from row `skip` on. A document is text, or a list of token ids."""
    size, read = os.path.getsize(path), 0
    try:
        if path.endswith(".parquet"):
            file = pq.ParquetFile(path)
            total, names = file.metadata.num_rows, file.schema_arrow.names
        else:
            import datasets  # a second or two, for these files only

            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the error too
            rows = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
            total, names = None, list(next(iter(rows)))
        name = column or ("text" if "text" in names else "input_ids")
        if name not in names:
            raise ValueError(f"no column {column or 'text'!r}: choose one of {', '.join(names)} with --column")
        if without and "meta" not in names:
            raise ValueError("--without needs a column meta with pile_set_name, as the Pile's text has")
        if total is None:
            docs = ((row[name], row.get("meta")) for row in rows)
        else:
            wanted = [name, "meta"] if without else [name]
            groups = (file.iter_batches(1000, row_groups=[g], columns=wanted) for g in range(file.num_row_groups))  # one at a time in memory
            columns = ([column.to_pylist() for column in batch.columns] for group in groups for batch in group)
            docs = (row for texts, *metas in columns for row in zip(texts, *metas or [repeat(None)]))
        for n, (doc, meta) in enumerate(docs, 1):
            doc = doc or ""
            if not isinstance(doc, (str, list)):
                raise ValueError(f"row {n} of column {name!r} is neither text nor a list of token ids: {str(doc)[:40]}")
            read += len(doc)
            if n > skip and not (without and pile_subset(meta) in without.split(",")):
                yield doc, n, n / total if total else min(1.0, read / size)
    except StopIteration:
        raise ValueError(f"{path} can't be read: it has no rows") from None
    except ValueError as e:  # pyarrow's and datasets' errors among them
        raise ValueError(f"{path} can't be read: {str(e).splitlines()[0]}") from None


def pile_subset(meta):
    """A row's meta, a dict or JSON -> the Pile's name of its subset, or None."""
    meta = json.loads(meta) if isinstance(meta, str) else meta
    return meta.get("pile_set_name") if isinstance(meta, dict) else None


def parts_of(path, skip, cut, seam):
    """Yields (bytes, document ends, val, bytes so far or None at the end) of a text file from byte `skip` on: in parts of about PIECE,
    so that a file of any size fits into memory, and that begin at seams, so that their tokens are the whole's. With `cut` the last
    5 % are a document of their own, and val."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        val_from = size - int(size * VAL_SHARE) if cut else size
        if cut:  # not within a token or, where there is no seam, within a letter
            f.seek(val_from)
            ahead = f.read(PIECE)
            val_from += (seam.search(ahead) or re.match(rb"[\x80-\xbf]*", ahead)).end()
        for val, begin, end in ((False, 0, val_from), (True, val_from, size))[: 1 + cut]:
            if begin < skip and end <= skip:
                continue
            at, part = max(begin, skip), b""
            f.seek(at)
            while more := f.read(min(PIECE, end - at - len(part))):
                part += more
                seams = [found.end() for found in seam.finditer(part, max(0, len(part) - 4096))]
                if seams and at + len(part) < end:
                    at += seams[-1]
                    yield part[: seams[-1]], False, val, at
                    part = part[seams[-1] :]
            yield part, True, val, None if end == size and val == cut else end


def documents(sources, position, is_val, seam):
    """Yields (name, document or a part of one, whether it ends there, val, position behind it, share of all that is read); position:
    [source, rows or bytes of it, documents before it] that are already taken."""
    first, skip, n = position
    for i, (name, path, _) in enumerate(sources[first:], first):
        path = path() if callable(path) else path
        if path.endswith(ROWS):
            for doc, rows, share in rows_of(path, skip):
                yield name, doc, True, is_val(name, n), [i, rows, n + 1], (i + share) / len(sources)
                n += 1
        else:
            val = is_val(name, n)
            for part, ends, behind, at in parts_of(path, skip, val is None, seam):
                share = at / os.path.getsize(path) if at else 1
                yield name, part, ends, behind if val is None else val, [i, at, n] if at else [i + 1, 0, n + 1], (i + share) / len(sources)
            n += 1
        skip = 0


def make_encoder(tokenizer):
    """(bytes or text -> uint16 array, vocab_size, eot) of a tokenizer by name; of VOCAB_SIZE:EOT, None for the first."""
    if re.fullmatch(r"\d+:\d+", tokenizer):
        vocab_size, eot = map(int, tokenizer.split(":"))
        if not eot < vocab_size <= 2**16:
            raise ValueError(f"--tokenizer={tokenizer}: end-of-text must be below the vocabulary's size, "
                             f"and that at most {2**16:,}, as tokens are uint16")
        return None, vocab_size, eot
    if tokenizer == "bytes":
        return lambda doc: np.frombuffer(doc if isinstance(doc, bytes) else doc.encode(), dtype=np.uint8).astype("<u2"), 257, 256
    if tokenizer != "gpt2":
        raise ValueError(f"unknown tokenizer {tokenizer!r}: it is bytes, gpt2 or, for rows of token ids, VOCAB_SIZE:EOT as 4096:1")
    try:
        bpe = tiktoken.get_encoding("gpt2")  # fetched once
    except OSError as e:
        raise OSError(f"tiktoken can't fetch GPT-2's vocabulary ({type(e).__name__}): fetch it where there is a network, "
                      "and set TIKTOKEN_CACHE_DIR to its folder") from None

    def encode(doc):  # what encode_ordinary gives, without its list
        return bpe.encode_to_numpy(doc.decode() if isinstance(doc, bytes) else doc, disallowed_special=()).astype("<u2")

    return encode, bpe.n_vocab, bpe.eot_token


def val_rule(sources, name):
    """A function (name, index of the document) -> True, False, or None: cut the last 5 %."""
    if val_every == 1:
        return lambda *_: True
    if name == "owt" and not tokens:  # nanoGPT: train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        chosen = set(nanogpt_val_documents().tolist())
        return lambda _, i: i in chosen
    by_hash = {n: int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") < VAL_SHARE * 2**64 for n, _, _ in sources if not n.endswith(ROWS)}
    whole = 0 < sum(by_hash.values()) < len(by_hash)
    return lambda n, i: i % val_every == 0 if n.endswith(ROWS) else by_hash[n] if whole else None


def nanogpt_val_documents(n=OWT_DOCUMENTS):
    """The documents of nanoGPT's val.bin, in its order: what datasets' train_test_split draws."""
    return np.random.default_rng(2357).permutation(n)[: int(np.ceil(0.0005 * n))]


# --- writing


def start_worker(tokenizer):
    """In each worker: its tokenizer; it leaves interruptions to the main process, and ends when that is gone."""
    global encode, vocab_size, eot
    encode, vocab_size, eot = make_encoder(tokenizer)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def encode_piece(piece):
    """[(name, document or part, ends, val)] -> {split: (bytes, documents that end)}, in a worker."""
    out, ended = dict(train=[], val=[]), dict(train=0, val=0)
    for name, doc, ends, val in piece:
        chosen = "val" if val else "train"
        ended[chosen] += ends
        if isinstance(doc, list):  # token ids, in windows that hold their own end-of-text
            ids = np.asarray(doc)
            if ids.size and ids.dtype.kind != "i":
                raise ValueError(f"{name} holds lists that are not token ids: {str(doc)[:40]}")
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f"{name} holds token ids from {ids.min()} to {ids.max()}, but the tokenizer has {vocab_size}: "
                                 "give theirs with --tokenizer")
            out[chosen].append(ids.astype("<u2"))
            continue
        if encode is None:
            raise ValueError(f"{name} holds text, not token ids: tokenize it first, into rows with a column input_ids")
        try:
            ids = encode(doc)
        except UnicodeDecodeError as e:
            before = doc[max(0, e.start - 20) : e.start]
            raise ValueError(f"{name} is not UTF-8 text ({e.reason} behind {before!r}): use --tokenizer=bytes, or leave it out") from None
        out[chosen].append(np.append(ids, eot).astype("<u2") if ends else ids)
    return {s: (np.concatenate(docs).tobytes() if docs else b"", ended[s]) for s, docs in out.items()}


def pieces(items):
    """What documents yields -> ([(name, document or part, ends, val)], position behind them, share read), about PIECE characters at a time."""
    piece, size = [], 0
    for *item, position, share in items:
        piece.append(item)
        size += len(item[1])
        if size >= PIECE or len(piece) >= 10_000:
            yield piece, position, share
            piece, size = [], 0
    if piece:
        yield piece, position, 1.0


def written(progress):
    """Tokens so far."""
    return progress["train"]["tokens"] + progress["val"]["tokens"]


def write(half, sources, is_val, tokenizer, progress):
    """Tokenize on all cores, write in order, and note every few seconds in progress.json how far all is on the disk."""
    out = {}

    def note():
        for f in out.values():
            f.flush()
            os.fsync(f.fileno())
        with open(os.path.join(half, "progress.json.tmp"), "w") as f:
            json.dump(progress, f)
        os.replace(os.path.join(half, "progress.json.tmp"), os.path.join(half, "progress.json"))

    note()  # first of all: it marks the folder as ours
    out |= {split: open(os.path.join(half, split + ".bin"), "ab") for split in ("train", "val")}
    for split, f in out.items():  # drop what a kill left behind the last note
        f.truncate(2 * progress[split]["tokens"])

    def within_a_text_file():
        source, taken, _ = progress["position"]
        return taken > 0 and not sources[source][0].endswith(ROWS)

    workers = os.cpu_count() or 1
    bar = tqdm(total=tokens or None, initial=written(progress), unit="token", unit_scale=True, disable=None)
    noted = time.monotonic()
    waiting = deque()
    seam = SEAM if tokenizer == "gpt2" else re.compile(b"")
    todo = pieces(documents(sources, progress["position"], is_val, seam))
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer,)) as pool:
            while not tokens or written(progress) < tokens or within_a_text_file():
                while len(waiting) < 2 * workers and (item := next(todo, None)):
                    waiting.append((pool.submit(encode_piece, item[0]), item[1], item[2]))
                if not waiting:
                    break
                result, position, share = waiting.popleft()
                for split, (data, docs) in result.result().items():
                    out[split].write(data)
                    progress[split]["tokens"] += len(data) // 2
                    progress[split]["documents"] += docs
                    progress["documents"] += docs
                progress["position"] = position
                bar.total = tokens or int(written(progress) / share)
                bar.update(written(progress) - bar.n)
                if time.monotonic() - noted > 10:
                    note()
                    noted = time.monotonic()
            pool.shutdown(cancel_futures=True)
    finally:
        note()
        bar.close()
        for f in out.values():
            f.close()


def order_val_as_nanogpt(half, eot):
    """val.bin holds nanoGPT's val documents in the corpus's order: write val_ordered.bin, in nanoGPT's. A kill may repeat it."""
    ids = np.fromfile(os.path.join(half, "val.bin"), dtype="<u2")
    docs = np.split(ids, np.flatnonzero(ids == eot)[:-1] + 1)
    wanted = nanogpt_val_documents()
    place = {document: i for i, document in enumerate(sorted(wanted.tolist()))}
    np.concatenate([docs[place[document]] for document in wanted.tolist()]).tofile(os.path.join(half, "val_ordered.bin"))


def read_json(path):
    """The dict in a file of an earlier run. ValueError, one line, if it is none."""
    try:
        with open(path) as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path} can't be read ({e}): --force begins anew") from None


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def main():
    configure(globals(), sys.argv[1:], __doc__)
    on_hub = dataset in HUB or "/" in dataset
    if files and (on_hub or dataset == "stdlib"):
        sys.exit(f"error: {dataset} has a source of its own; give the files another name with --dataset=NAME")
    if not files and not on_hub and dataset not in ("", "stdlib"):
        sys.exit(f"error: no source for {dataset!r}: give --files='a.txt,dir/*.md', a hub dataset as ORG/NAME, or stdlib, {', '.join(HUB)}")
    if tokens < 0 or val_every < 1:
        sys.exit("error: --tokens must be 0 or more, --val_every 1 or more")
    name = (dataset or ("files" if files else "stdlib")).partition("@")[0].split("/")[-1]
    if name in ("", ".", ".."):
        sys.exit(f"error: --dataset={dataset} does not end in a folder name for data/")
    done, half = os.path.join("data", name), os.path.join("data", name + ".tmp")
    with one_line_errors():
        chosen = tokenizer or ("gpt2" if on_hub else "bytes")
        _, vocab_size, eot = make_encoder(chosen)
        source = files or (f"{HUB.get(dataset, dataset)} {split} {folder}".rstrip() if on_hub else f"stdlib of Python {sys.version.split()[0]}")
        meta = dict(tokenizer=chosen, vocab_size=vocab_size, eot=eot, source=source, asked_tokens=tokens, val_every=val_every, without=without)
        if os.path.exists(os.path.join(done, "meta.json")) and not force:
            old = read_json(os.path.join(done, "meta.json"))
            differs = [key for key in meta if old.get(key) != meta[key]]
            if differs:
                raise ValueError(f"{done} holds {differs[0]} {old.get(differs[0])!r}, not {meta[differs[0]]!r}: --force replaces it")
            print(f"{done} is prepared already: {old['train']['tokens']:,} train and {old['val']['tokens']:,} val tokens (--force redoes it)")
            return
        check_folder(done, TOKEN_FILES, ["meta.json"])
        check_folder(half, HALF_FILES, ["progress.json", "meta.json"])
        sources = local_files(files) if files else hub_files(HUB.get(dataset, dataset)) if on_hub else stdlib_files()
        os.makedirs("data", exist_ok=True)
        size = sum(size for *_, size in sources)
        need = 2 * tokens or int(size * (2 if chosen == "bytes" else 0.8))
        free = shutil.disk_usage("data").free
        if need > free:
            raise OSError(f"data/{name} needs about {need / 1e9:.2g} GB and {free / 1e9:.2g} GB are free: ask for less with --tokens")

        progress = dict(meta=meta, position=[0, 0, 0], documents=0, train=dict(tokens=0, documents=0), val=dict(tokens=0, documents=0))
        if os.path.exists(os.path.join(half, "progress.json")) and not force:
            old = read_json(os.path.join(half, "progress.json"))
            if old.get("meta") == meta:
                progress = old
                print(f"going on behind {written(old):,} tokens")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last note is written
        try:
            os.makedirs(half, exist_ok=True)
            write(half, sources, val_rule(sources, dataset), chosen, progress)
            if not written(progress):
                raise ValueError(f"there is no document in {source}")
            if dataset == "owt" and not tokens and progress["documents"] == OWT_DOCUMENTS:
                order_val_as_nanogpt(half, eot)
        except ValueError:  # bad input: nothing to go on with
            remove_files(half, HALF_FILES)
            raise
        except OSError as e:
            raise OSError(f"{e}; data/{name} is not finished: run the same command to go on behind {written(progress):,} tokens") from None
        except KeyboardInterrupt:
            sys.exit(f"interrupted: run the same command to go on behind {written(progress):,} tokens")
        if os.path.exists(os.path.join(half, "val_ordered.bin")):
            os.replace(os.path.join(half, "val_ordered.bin"), os.path.join(half, "val.bin"))
        meta |= {s: progress[s] | dict(sha256=sha256(os.path.join(half, s + ".bin"))) for s in ("train", "val")}
        with open(os.path.join(half, "meta.json"), "w") as f:
            json.dump(meta, f, indent=2)
        os.remove(os.path.join(half, "progress.json"))
        remove_files(done, TOKEN_FILES)
        os.rename(half, done)
    for s in ("train", "val"):
        print(f"{done}/{s}.bin: {meta[s]['tokens']:,} tokens, {meta[s]['documents']:,} documents")
    if dataset == "owt" and progress["documents"] != OWT_DOCUMENTS:
        print(f"this is a part of OpenWebText: {progress['documents']:,} of {OWT_DOCUMENTS:,} documents")


if __name__ == "__main__":
    main()
