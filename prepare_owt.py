"""
Documents to tokens, once: data/NAME/{train,val}.bin (uint16) and meta.json.

    python prepare_owt.py                                                # this Python's own source, as bytes
    python prepare_owt.py --dataset=mytext --files='a.txt,dir/*.md'      # local text files, as bytes
    python prepare_owt.py --dataset=mytext --files='*.jsonl' --tokenizer=gpt2     # or rows, of .parquet too
    python prepare_owt.py --dataset=owt                                  # OpenWebText, nanoGPT's val split
    python prepare_owt.py --dataset=owt --tokens=700_000_000             # enough of it for a fine-tune
    python prepare_owt.py --dataset=ORG/NAME --column=text --split=train # any data set of the hub
    python prepare_owt.py --dataset=ORG/NAME --tokenizer=4096:1          # rows of another tokenizer's ids

Each document is followed by the end-of-text id; rows of ids that all have one length are taken as windows
of a stream, which hold it. val is, of whole text files, about 5 %, by a hash of their path (of few, the
end of each); of rows every 200th; of little text more, so that a gap can be seen; of all of OpenWebText
nanoGPT's. Run the same command again after an interruption, or when a bad file is mended, and it resumes.
"""
import glob
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass

from parts.errors import UserError, begin_script, handle_endings, interruptible, on_disk

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
from tqdm import tqdm

from configurator import configure
from parts.files import FolderLock, check_folder, remove_files, whole_file
from parts.preparation import (
    DONE_FILES,
    HALF_FILES,
    NOTHING,
    after_batch,
    finish,
    finished,
    is_prepared,
    note,
    open_token_files,
    resume,
    take_name,
    written,
)
from parts.sources import (
    ANY_SEAM,
    GPT2_SEAM,
    HUB,
    NO_SEAM,
    hub_sources,
    local_sources,
    read_rows,
    read_text,
    stdlib_sources,
)
from parts.tokenizer import make_tokenizer

# -----------------------------------------------------------------------------
dataset = ""  # stdlib (the default), owt, pile, pile-filtered, ORG/NAME[@REVISION], or a name for --files
files = ""  # local files, text, .jsonl or .parquet: paths and patterns, with commas between
tokenizer = ""  # bytes, gpt2, a model's directory or, for ids, VOCAB_SIZE:EOT; "": gpt2 for the hub, else bytes
tokens = 0  # >= 0: stop after so many, at the end of a row or text file; 0: take all
column = ""  # of rows: text, or lists of token ids; "": text, or input_ids where there is no text
split = "train"  # of a hub data set: which files
folder = ""  # of a hub data set: only files below this folder, where several hold the split
val_every = 0  # >= 0: of rows, every so many-th is val; 0: 200, or less of little text; 1: all, to evaluate on
without = ""  # the Pile's subsets to leave out: OpenWebText2,Books3,BookCorpus2, as the published filter does
force = False  # prepare again what is prepared already
# -----------------------------------------------------------------------------

OWT_DOCUMENTS = 8_013_769
VAL_SHARE = 0.05  # of whole text files
VAL_EVERY = 200  # of rows
VAL_TOKENS = 20_000  # not fewer, where they are at most a fifth of all
# a gap's standard error x sqrt(val tokens), in nats: on the bundled model, and on one with a BPE of 4,096 tokens
TOKEN_SD = dict(byte=0.42, token=0.59)
BATCH = 1_000_000  # characters that a worker takes at a time
NOTE_EVERY = 10  # seconds


# --- train or val


def val_rule(sources, chosen):
    """A function (source, index of the document) -> True: val; False: train; a share: so much of the
    file, at its end, is val."""
    if val_every == 1:
        return lambda source, i: True
    if dataset == "owt" and not tokens:
        chosen = set(nanogpt_val_documents().tolist())
        return lambda source, i: i in chosen
    size = max(1, sum(source.size for source in sources))
    val_size = VAL_TOKENS * bytes_per_token(chosen)
    needed = min(0.2, val_size / size)  # as a share
    share = max(VAL_SHARE, needed)
    asked = min(size, tokens * bytes_per_token(chosen) or size)
    every = val_every or max(5, min(VAL_EVERY, asked // val_size))
    # By a hash of the path, a file stays on its side when others come or go.
    by_hash, found = {}, 0
    for source in sources:
        if not source.is_rows:
            digest = hashlib.sha256(source.name.encode()).digest()
            by_hash[source.name] = int.from_bytes(digest[:8], "big") < share * 2**64
            found += by_hash[source.name] * source.size
    whole_files = needed / 2 < found / size < 0.6

    def rule(source, i):
        if source.is_rows:
            return i % every == 0
        return by_hash[source.name] if whole_files else share

    return rule


def nanogpt_val_documents(n=OWT_DOCUMENTS):
    """The documents of nanoGPT's val.bin, in its order: what datasets' train_test_split draws. The
    published losses on OpenWebText are over these."""
    return np.random.default_rng(2357).permutation(n)[: int(np.ceil(0.0005 * n))]


def order_val_as_nanogpt(half, eot):
    """val.bin holds nanoGPT's val documents in the corpus's order: write val_ordered.bin, in nanoGPT's.
    val.bin itself stays, so that a kill may repeat this."""
    ids = np.fromfile(os.path.join(half, "val.bin"), dtype="<u2")
    docs = np.split(ids, np.flatnonzero(ids == eot)[:-1] + 1)
    wanted = nanogpt_val_documents().tolist()
    place = {document: i for i, document in enumerate(sorted(wanted))}
    ordered = np.concatenate([docs[place[document]] for document in wanted])
    with whole_file(os.path.join(half, "val_ordered.bin")) as f:
        f.write(ordered.tobytes())


# --- reading: a source's Pieces -> Tasks -> batches of Tasks, which workers encode


@dataclass
class Task:
    """A Piece for a worker, and how far all is read with it."""

    name: str  # of the source
    content: str | bytes | list[int]
    ends: bool  # whether the document ends with it
    packed: bool
    val: bool
    position: list[int]  # source, rows or bytes of it, documents: what is taken, with this one
    share: float  # of all sources, with this one


def read(sources, position, rule, seam):
    """Yields Tasks, from the position on."""
    first, skip, documents = position
    for i, source in enumerate(sources[first:], first):
        path = source.fetch()
        if source.is_rows:
            pieces = read_rows(path, skip, column, without)
        else:
            val = rule(source, documents)
            pieces = read_text(path, skip, val if isinstance(val, float) else 0, seam)
        for piece in pieces:
            val = rule(source, documents) if piece.val is None else piece.val
            if source.is_rows or piece.last:
                documents += 1
            after = [i + 1, 0, documents] if piece.last else [i, piece.taken, documents]
            share = (i + piece.share) / len(sources)
            yield Task(source.name, piece.content, piece.ends, piece.packed, val, after, share)
        skip = 0


def next_batch(tasks):
    """The next Tasks, of about BATCH characters; [] at the end."""
    batch, size = [], 0
    for task in tasks:
        batch.append(task)
        size += len(task.content)
        if size >= BATCH or len(batch) >= 10_000:
            break
    return batch


# --- encoding, in the workers


def start_worker(name):
    """A worker has its tokenizer; it leaves interruptions to the main process, and ends when that is
    gone."""
    global worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core
    worker_tokenizer = make_tokenizer(name)
    handle_endings(signal.SIG_IGN)
    # A signal to all of us: the main process ends this one in order, or it ends by itself. At once, it
    # could leave half a result in the pipe, for which the main process would wait for ever.
    signal.signal(signal.SIGTERM, lambda number, frame: threading.Timer(5, os._exit, [1]).start())
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_batch(batch):
    """Tasks -> {"train" and "val": (bytes, their counts)}."""
    eot = np.array([worker_tokenizer.eot], "<u2")
    parts = dict(train=[], val=[])
    counts = dict(train=dict(NOTHING), val=dict(NOTHING))
    for task in batch:
        which = "val" if task.val else "train"
        if isinstance(task.content, list):
            ids = checked_ids(task.name, task.content)
            has_eot = task.packed or ids[-1:].tolist() == [worker_tokenizer.eot]
        else:
            ids = encode(task.name, task.content)
            has_eot = False
        parts[which].append(ids)
        counts[which]["documents"] += task.ends
        if task.ends and not has_eot:  # what comes next is another document
            parts[which].append(eot)
            counts[which]["eot_appended"] += 1
    encoded = {}
    for which in parts:
        data = b"".join(ids.tobytes() for ids in parts[which])
        counts[which]["tokens"] = len(data) // 2
        encoded[which] = data, counts[which]
    return encoded


def encode(name, content):
    if worker_tokenizer.encode is None:
        raise UserError(f"{name} holds text, not token ids: tokenize it first, "
                        "into rows with a column input_ids")
    try:
        return worker_tokenizer.encode(content)
    except UnicodeError as e:  # of bytes, or of half a letter that JSON can hold
        before = content[max(0, e.start - 20) : e.start]
        raise UserError(f"{name} is not UTF-8 text ({e.reason} after {before!r}): use --tokenizer=bytes, "
                        "or leave it out") from None


def checked_ids(name, content):
    """A list of token ids as uint16. UserError if it holds anything else, or ids that are too large."""
    try:
        ids = np.array(content)
        is_ids = not ids.size or (ids.dtype.kind == "i" and ids.ndim == 1)
    except ValueError:  # of lists of several lengths
        is_ids = False
    vocab_size = worker_tokenizer.vocab_size
    if not is_ids:
        raise UserError(f"{name} holds lists that are not token ids: {str(content)[:40]}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise UserError(f"{name} holds token ids from {ids.min()} to {ids.max()}, "
                        f"but the tokenizer has {vocab_size}: give theirs with --tokenizer")
    return ids.astype("<u2")


# --- writing


def is_enough(progress, sources):
    """Whether the tokens that were asked for are there. A text file is taken whole, so that its val is
    there too."""
    i, taken, _ = progress["position"]
    within_text_file = taken > 0 and not sources[i].is_rows
    return tokens > 0 and written(progress) >= tokens and not within_text_file


def encoded_in_order(tasks, chosen):
    """Yields (position after a batch, share of all that is read with it, encode_batch's result), of work on all cores.
    A UserError in reading comes after all that was read before it."""
    workers = os.cpu_count() or 1
    waiting = deque()
    problem = None
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(chosen,)) as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and not problem:
                    try:
                        batch = next_batch(tasks)
                    except UserError as e:
                        problem = e
                        break
                    if not batch:
                        break
                    waiting.append((batch[-1].position, batch[-1].share, pool.submit(encode_batch, batch)))
                if not waiting:
                    break
                position, share, result = waiting.popleft()
                yield position, share, result.result()
        finally:  # what is not begun is not waited for
            pool.shutdown(cancel_futures=True)
    if problem:
        raise problem


def write(half, sources, rule, chosen, progress):
    """Encode and write in order, with a note of the progress every few seconds."""
    out = open_token_files(half, progress, sources)
    seam = dict(gpt2=GPT2_SEAM, bytes=ANY_SEAM).get(chosen, NO_SEAM)
    tasks = read(sources, progress["position"], rule, seam)
    bar = tqdm(total=tokens or None, initial=written(progress), unit="token", unit_scale=True, disable=None)
    noted = time.monotonic()
    try:
        with closing(encoded_in_order(tasks, chosen)) as batches:
            while not is_enough(progress, sources) and (batch := next(batches, None)):
                position, share, encoded = batch
                for which, (data, _) in encoded.items():
                    out[which].write(data)
                # at once: an interruption finds a batch in it whole or not at all
                progress.update(after_batch(progress, position, encoded))
                bar.total = tokens or int(written(progress) / max(share, 1e-9))
                bar.update(written(progress) - bar.n)
                if time.monotonic() - noted > NOTE_EVERY:
                    note(half, out, progress, sources)
                    noted = time.monotonic()
    finally:
        note(half, out, progress, sources)
        bar.close()
        for f in out.values():
            f.close()


# --- from asking to files


def find_sources(on_hub):
    if files:
        return local_sources(files)
    return hub_sources(HUB.get(dataset, dataset), split, folder) if on_hub else stdlib_sources()


def bytes_per_token(chosen):
    """Of text, about: GPT-2's tokens have some 4 letters, those of smaller vocabularies fewer."""
    return 1 if chosen == "bytes" else 3


def check_disk(name, half, sources, chosen):
    size = sum(source.size for source in sources)
    need = 2 * tokens or int(2 * size / bytes_per_token(chosen))
    need -= sum(os.path.getsize(path) for path in glob.glob(f"{glob.escape(half)}/*.bin"))  # of an earlier try
    free = shutil.disk_usage("data").free
    if need > free:
        remove_files(half, [])  # if it is empty
        raise UserError(f"data/{name} needs about {need / 1e9:.2g} GB and {free / 1e9:.2g} GB are free: "
                        "ask for less with --tokens")


def say_what_val_shows(n, word):
    """Of n val tokens, each a byte or a token: the standard error to expect of a gap."""
    error = TOKEN_SD[word] / math.sqrt(max(1, n))
    print(f"{n:,} val tokens: expect a standard error of about {error:.4f} nats of a gap")
    if error > 0.005:
        print("note: a gap is some 0.02 nats, and will not be seen: prepare more text, "
              f"for {VAL_TOKENS:,} val tokens")


def next_command(name):
    config = dict(stdlib="config/remove_ln_tiny.py", owt="config/remove_ln.py").get(name)
    mine = f"config/remove_ln_mine.py --init_from=path/to/model --dataset={name}"
    return f"python train.py {config or mine}"


def request():
    """What is asked for: (the folder's name, whether it is on a hub, the Tokenizer, what meta.json says of
    all that). UserError."""
    on_hub = dataset in HUB or "/" in dataset
    if files and (on_hub or dataset == "stdlib"):
        raise UserError(f"{dataset} has a source of its own; give the files another name with --dataset=NAME")
    if not files and not on_hub and dataset not in ("", "stdlib"):
        raise UserError(f"no source for {dataset!r}: give --files='a.txt,dir/*.md', "
                        f"a hub data set as ORG/NAME, or stdlib, {', '.join(HUB)}")
    name = dataset or ("files" if files else "stdlib")
    name = name.partition("@")[0].split("/")[-1]
    if name in ("", ".", ".."):
        raise UserError(f"--dataset={dataset} does not end in a folder name for data/")
    made = make_tokenizer(tokenizer or ("gpt2" if on_hub else "bytes"))
    origin = f"stdlib of Python {sys.version.split()[0]}"
    if files or on_hub:
        origin = files or f"{HUB.get(dataset, dataset)} {split} {folder}".rstrip()
    taken = column or ("input_ids" if made.encode is None else "")
    meta = dict(tokenizer=made.name, vocab_size=made.vocab_size, eot=made.eot, source=origin,
                asked_tokens=tokens, val_every=val_every, without=without, column=taken)
    if made.sha256:
        meta["tokenizer_sha256"] = made.sha256
    return name, on_hub, made, meta


def prepare(name, half, sources, made, meta):
    """All documents into the unfinished folder. Returns the progress; what breaks it off says how to go on."""
    progress = resume(half, meta, sources, force)
    try:
        write(half, sources, val_rule(sources, made.name), made.name, progress)
        if not written(progress):
            raise UserError(f"there is no document in {meta['source']}")
        if dataset == "owt" and not tokens and progress["documents"] == OWT_DOCUMENTS:
            order_val_as_nanogpt(half, made.eot)
    except UserError as e:  # bad input
        if written(progress):
            raise UserError(f"{e}; when that is mended, the same command resumes after "
                            f"{written(progress):,} tokens") from None
        remove_files(half, HALF_FILES)
        raise
    except OSError as e:  # a full disk, or a broken line to the hub
        if type(e) is FileNotFoundError:  # neither of these: a mistake in the code
            raise
        raise UserError(f"{e}; data/{name} is not finished: run the same command to resume "
                        f"after {written(progress):,} tokens") from None
    except BrokenProcessPool:
        raise UserError("a worker was killed, as a machine without memory does; run the same command to resume "
                        f"after {written(progress):,} tokens") from None
    except KeyboardInterrupt:
        sys.exit(f"interrupted: run the same command to resume after {written(progress):,} tokens")
    return progress


def main():
    global column
    configure(globals(), sys.argv[1:], __doc__)
    name, on_hub, made, meta = request()
    column = meta["column"]
    done, half = os.path.join("data", name), os.path.join("data", name + ".tmp")
    if not force and is_prepared(done, meta):
        return
    check_folder(done, DONE_FILES, ["meta.json"])
    check_folder(half, HALF_FILES, ["progress.json", "progress.json.tmp", "meta.json"])
    sources = find_sources(on_hub)
    with on_disk("can't write into data"):
        os.makedirs("data", exist_ok=True)
    with on_disk(f"can't write into {half}"):
        os.makedirs(half, exist_ok=True)
        lock = FolderLock(half)  # noqa: F841  held to the end: two preparations at a time would mix their files
    whole = finished(half, meta, sources)
    if not whole:
        check_disk(name, half, sources, made.name)
        with interruptible():  # the last note is written
            progress = prepare(name, half, sources, made, meta)
        whole = finish(half, meta, progress)
    with on_disk(f"can't write {done}"):
        take_name(half, done)
    meta = whole
    for which in ("train", "val"):
        print(f"{done}/{which}.bin: {meta[which]['tokens']:,} tokens, {meta[which]['documents']:,} documents")
    documents = meta["train"]["documents"] + meta["val"]["documents"]
    if dataset == "owt" and documents != OWT_DOCUMENTS:
        print(f"this is a part of OpenWebText: {documents:,} of {OWT_DOCUMENTS:,} documents")
    say_what_val_shows(meta["val"]["tokens"], "byte" if made.name == "bytes" else "token")
    if val_every != 1:
        print(f"next: {next_command(name)}")


if __name__ == "__main__":
    main()
