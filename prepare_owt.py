"""
Documents to tokens, once: data/NAME/{train,val}.bin (uint16) and meta.json.

    python prepare_owt.py                                                # this Python's own source, as bytes
    python prepare_owt.py --dataset=mytext --files='a.txt,dir/*.md'      # local text files, as bytes
    python prepare_owt.py --dataset=mytext --files='*.jsonl' --tokenizer=gpt2     # rows; also .parquet, .csv, .arrow
    python prepare_owt.py --dataset=owt                                  # OpenWebText, nanoGPT's val split
    python prepare_owt.py --dataset=owt --tokens=700_000_000             # enough of it for a fine-tune
    python prepare_owt.py --dataset=ORG/NAME --column=text --split=train # any data set of the hub
    python prepare_owt.py --dataset=ORG/NAME --tokenizer=4096:1          # rows of another tokenizer's ids

A document is a text file or a row; the end-of-text id follows each. Rows of ids can also be windows of a stream, which
has its own end-of-text ids. val is about 5 % of the text files, chosen by a hash of their path (of few files, the end
of each), or every 200th row; more if there is little text. All of OpenWebText gets nanoGPT's split. After an
interruption, or once a bad file is mended, the same command continues.

meta.json has the tokenizer, its vocab_size and eot, the source and the settings asked for; for train and val the number
of tokens, of documents, and of end-of-text ids that were appended, and the file's sha256; and `spelled`, the number of
special tokens that the text spells and that stayed text.
"""
import hashlib
import math
import os
import re
import sys
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice

from parts.errors import UserError, begin_script, command, interruptible, say_next, on_disk, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
from tqdm import tqdm

from configurator import configure
from parts.files import FolderLock, check_folder, read_json, remove_empty, remove_files, unfinished, whole_file
from parts.files import write_json
from parts.sources import ANY_SEAM, GPT2_SEAM, HUB, NO_SEAM, STDLIB_SHARES, hub_sources, local_sources, place
from parts.sources import read_rows, read_text, stdlib_sources
from parts.tokenizer import make_tokenizer

# -----------------------------------------------------------------------------
dataset = ""  # stdlib (the default), stdlib_pretrain, owt, pile, pile-filtered, ORG/NAME[@REVISION], or --files' name
files = ""  # local files: paths and patterns, separated by commas
tokenizer = ""  # bytes, gpt2, a model's directory or, for ids, VOCAB_SIZE:EOT; "": gpt2 for the hub, else bytes
tokens = 0  # stop at the end of the row or text file that reaches this many; 0: take all
column = ""  # the column with text or lists of token ids; "": text, or input_ids if there is no text
rows = ""  # what a row of ids is: documents or windows (of a stream with end-of-text in it); "": find out, or ask
split_on = ""  # a text that ends a document in text and rows of text, such as <|endoftext|>
split = "train"  # which split of a hub data set
folder = ""  # take only files below this folder of a hub data set, if several folders have the split
val_every = 0  # every n-th row is val; 0: 200, or less if there is little text; 1: all rows and files, to evaluate on
force = False  # prepare again what is prepared already
# -----------------------------------------------------------------------------

OWT_DOCUMENTS = 8_013_769
VAL_SHARE = 0.05  # share of text files that is val
VAL_EVERY = 200  # every 200th row is val
VAL_TOKENS = 20_000  # at least, but at most a fifth of all
# standard error of a gap x sqrt(val tokens), in nats: measured on assets/tiny and on a model with a BPE of 4,096 tokens
TOKEN_SD = dict(byte=0.42, token=0.59)
JOB = 2_000_000  # bytes of small files in a job
CHUNK = 2**24  # tokens that are copied or counted at a time
BATCH = 250_000  # characters that a thread encodes at a time
THREADS = os.cpu_count() or 1
WINDOWS = {"": None, "documents": False, "windows": True}
TOKEN_FILES = ("train.bin", "val.bin", "meta.json")
# the names of our files in an unfinished folder; meta.json marks it as ours
OURS = re.compile(r"\.?([0-9a-f]{16}\.(bin|npy)|train\.bin|val\.bin|meta\.json)(\.unfinished)?")


# --- train or val


def with_val(sources, chosen):
    """([(source, val)], every, share). val is True; False, for train; a float: this share of the text file, at its end,
    is val; None: a file of rows, of which every every-th is val."""
    size = max(1, sum(source.size for source in sources))
    per_token = 1 if chosen == "bytes" else 3  # bytes, a rough lower estimate: GPT-2's tokens have about 4
    needed = min(0.2, VAL_TOKENS * per_token / size)
    share = max(VAL_SHARE, needed)
    asked = min(size, tokens * per_token or size)
    every = val_every or max(5, min(VAL_EVERY, asked // (VAL_TOKENS * per_token)))
    found = sum(source.size for source in sources if not source.rows_format and place(source.name) < share)
    whole_files = needed / 2 < found / size < 0.6

    def val(source):
        return val_every == 1 or (place(source.name) < share if whole_files else share)

    return [(source, None if source.rows_format else val(source)) for source in sources], every, share


def nanogpt_val_documents(n=OWT_DOCUMENTS):
    """The documents of nanoGPT's val.bin, in its order, as datasets' train_test_split draws them."""
    return np.random.default_rng(2357).permutation(n)[: int(np.ceil(0.0005 * n))]


# --- encoding: a job (some files) becomes a part: KEY.bin, its tokens, and KEY.npy, its table of documents


def make_parts(half, pairs, made):
    """Encode the jobs that have no part yet, up to enough tokens. Returns the parts' paths without extension. A job is
    a list of (source, val): one hub file, one large file, or small files of JOB bytes in all."""
    jobs, size = [], JOB
    for source, val in pairs:
        if size >= JOB or source.repo:
            jobs.append([])
            size = 0
        jobs[-1].append((source, val))
        size += source.size
    parts, left = [], tokens
    with tqdm(total=tokens or None, unit="token", unit_scale=True, disable=None) as bar:
        for job in jobs:
            all_that_matters = job, left, made.name, made.sha256, column, rows, split_on
            parts.append(os.path.join(half, hashlib.sha256(repr(all_that_matters).encode()).hexdigest()[:16]))
            if not os.path.exists(parts[-1] + ".npy"):
                encode_job(job, parts[-1], left, made)
            found = int(np.load(parts[-1] + ".npy")[:, 0].sum())
            bar.update(found)
            if tokens and found >= left:
                break
            left -= found if tokens else 0
    return parts


def encode_job(job, part, limit, made):
    """Write a part: all of a job, or its documents up to the one that reaches limit tokens. The table has a row for
    each document: tokens; 1 if we appended its end-of-text; 0: train, 1: val, 2: a row; 1 if its row or file ends;
    special tokens that its text spells."""
    documents, length, spelled, written = array("q"), 0, 0, 0
    # KEY.npy takes its name last: if it is there, the part is whole
    with whole_file(part + ".npy") as table, whole_file(part + ".bin") as out:
        for piece, ids, appended, found in in_order(partial(encode, made), make_batches(job, made)):
            out.write(ids)
            length, spelled = length + len(ids), spelled + found
            if piece.ends:
                documents.extend((length, appended, 2 if piece.val is None else piece.val, piece.last, spelled))
                written, length, spelled = written + length, 0, 0
                if limit and piece.last and written >= limit:
                    break
        np.save(table, np.frombuffer(documents, np.int64).reshape(-1, 5))


def make_batches(job, made):
    """Yields lists of Pieces of about BATCH characters in all."""
    seam = dict(gpt2=GPT2_SEAM, bytes=GPT2_SEAM if split_on else ANY_SEAM).get(made.name, NO_SEAM)
    name = column or ("input_ids" if made.encode is None else "")
    batch, size = [], 0
    for source, val in job:
        is_rows = bool(source.rows_format)
        pieces = read_rows(source, name, made.eot, WINDOWS[rows]) if is_rows else read_text(source, val, seam)
        for piece in split_pieces(pieces) if split_on else pieces:
            batch.append(piece)
            size += len(piece.content)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    yield batch


def split_pieces(pieces):
    """Yields text Pieces cut at each split_on, which ends a document and is left out."""
    begun = False  # the current document has text
    for piece in pieces:
        if isinstance(piece.content, list):
            yield piece
            continue
        *whole, rest = piece.content.split(split_on.encode())
        if whole and piece.ends and not rest.strip():
            rest = whole.pop()  # the file or row ends with a split_on
        for text in whole:
            if begun or text.strip():
                yield replace(piece, content=text, ends=True, last=False)
            begun = False
        yield replace(piece, content=rest)
        begun = not piece.ends


def in_order(function, batches):
    """Yields the items of each function(batch) in order. Threads compute ahead: tokenizers release Python's lock."""
    waiting = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches:
            waiting.append(pool.submit(function, batch))
            if len(waiting) > 2 * THREADS:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def encode(made, batch):
    """[(Piece, its tokens and end-of-text as uint16, whether we appended that, how many special tokens it spells)]."""
    special = [text.encode() for text in made.special]
    found = []
    for piece in batch:
        is_ids = isinstance(piece.content, list)
        with reading(piece.name):
            if made.encode is None and not is_ids:
                raise ValueError("it holds text, not token ids: tokenize it first, into rows with a column input_ids")
            ids = np.array(piece.content) if is_ids else made.encode(piece.content)
            if ids.size and (ids.dtype.kind not in "iu" or ids.ndim != 1):
                raise ValueError(f"these are not token ids: {str(piece.content)[:40]}")
            if ids.size and not 0 <= ids.min() <= ids.max() < made.vocab_size:
                raise ValueError(f"ids from {ids.min()} to {ids.max()}, but --tokenizer has {made.vocab_size}")
            ids = ids.astype("<u2")
        appended = marked = piece.ends and not piece.window
        if marked and is_ids and len(ids):  # ids may have one already, first or last
            first, last = ids[0] == made.eot, ids[-1] == made.eot
            appended, ids = not (first or last), ids[int(first) : len(ids) - int(last)]
        spelled = 0 if is_ids else sum(map(piece.content.count, special))
        found.append((piece, np.append(ids, made.eot).astype("<u2") if marked else ids, appended, spelled))
    return found


# --- from parts to token files


def copy(source, target, n):
    """n tokens from an open file to another, CHUNK at a time."""
    while n > 0:
        n -= target.write(source.read(2 * min(n, CHUNK))) // 2


def join(half, parts, every, share, eot):
    """Write train.bin and val.bin. Returns {"train" and "val": {tokens, documents, eot_appended, sha256}, "spelled":
    the number of special tokens that the text spells}."""
    tables = [np.load(part + ".npy") for part in parts]
    length, appended, side, last, spelled = np.concatenate([*tables, np.zeros((0, 5), np.int64)]).T
    number = np.cumsum(last) - last  # index of the row or text file
    owt = dataset == "owt" and not tokens and val_every != 1
    order = nanogpt_val_documents() if owt else []
    is_val = np.where(side == 2, np.isin(number, order) if owt else number % every == 0, side == 1)
    tail = np.where(is_val, length, 0)  # how many tokens at a document's end are val
    # few long rows: each is cut at its end, as few text files are
    cut = not val_every and not owt and (side == 2).all() and 2 * tail.sum() > length.sum()
    if cut:
        is_val, tail = np.zeros(len(length), bool), (share * length).astype(np.int64)
    held = {}  # number: a val document of OpenWebText
    with whole_file(os.path.join(half, "train.bin")) as train, whole_file(os.path.join(half, "val.bin")) as val:
        documents = zip(number, length, tail)
        for part, table in zip(parts, tables):
            with open(part + ".bin", "rb") as f:
                for i, n, of_val in islice(documents, len(table)):
                    copy(f, train, n - of_val)
                    if 0 < of_val < n:
                        train.write(np.array([eot], "<u2"))
                    if owt and of_val:
                        held[i] = f.read(2 * of_val)
                    else:
                        copy(f, val, of_val)
        for i in order if len(number) == OWT_DOCUMENTS else sorted(held):
            val.write(held[i])
    splits = {}
    appended_to = dict(train=np.where(tail > 0, 1, appended)[~is_val], val=appended[is_val | (tail > 0)])
    for which, appended in appended_to.items():
        with open(os.path.join(half, which + ".bin"), "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            splits[which] = dict(tokens=f.tell() // 2, documents=len(appended), eot_appended=int(appended.sum()),
                                 sha256=sha256)
    return splits | dict(spelled=int(spelled.sum()))


# --- from asking to files


def say_what_is_there(done, made, meta):
    """Print the sizes; how many tokens are end-of-text or unknown, and how many special tokens stayed text; and the
    standard error to expect of a gap over the val tokens."""
    for which in ("train", "val"):
        print(f"{done}/{which}.bin: {meta[which]['tokens']:,} tokens, {meta[which]['documents']:,} documents")
    path, n = os.path.join(done, "train.bin"), meta["train"]["tokens"]
    found = doubled = unknown = 0
    with open(path, "rb") as f:
        last = np.zeros(1, bool)  # whether the token before is end-of-text
        while len(ids := np.fromfile(f, "<u2", CHUNK)):
            is_eot = np.concatenate([last, ids == made.eot])
            found, doubled = found + is_eot[1:].sum(), doubled + (is_eot[1:] & is_eot[:-1]).sum()
            unknown, last = unknown + np.sum(ids == made.unk), is_eot[-1:]
    print(f"end-of-text: {found / max(1, n):.3%} of {path}, {doubled:,} of {found:,} doubled")
    if not found and n:
        print("note: without end-of-text, a model can't tell where a document ends")
    if unknown:
        share = unknown / n
        print(f"{'note: ' if share > 0.01 else ''}{share:.3%} of {path} is the unknown token")
    if meta["spelled"]:
        print(f"note: {meta['spelled']:,} special tokens are spelled in the text, and stay text: if they end "
              f"documents, use --split_on='{made.special[0]}'")
    for note in made.notes():
        print(f"note: {note}")
    documents = meta["train"]["documents"] + meta["val"]["documents"]
    if dataset == "owt" and documents != OWT_DOCUMENTS:
        print(f"this is a part of OpenWebText: {documents:,} of {OWT_DOCUMENTS:,} documents")
    n = meta["val"]["tokens"]
    error = TOKEN_SD["byte" if made.name == "bytes" else "token"] / math.sqrt(max(1, n))
    print(f"{n:,} val tokens: expect a standard error of about {error:.4f} nats of a gap")
    if error > 0.005:
        print(f"note: a gap is about 0.02 nats, too small for this: prepare more text, for {VAL_TOKENS:,} val tokens")


def next_command(name, made):
    configs = dict(stdlib="remove_ln_tiny", stdlib_pretrain="pretrain_tiny", owt="remove_ln")
    if name in configs:
        return command("train.py", f"config/{configs[name]}.py")
    model = made.name if os.path.isdir(made.name) else "path/to/model"
    return command("train.py", "config/remove_ln_mine.py", f"--init_from={model}", f"--dataset={name}")


def request():
    """The settings as (name of the folder, sources or None for a hub, Tokenizer, head of meta.json). UserError."""
    on_hub = dataset in HUB or "/" in dataset
    if files and (on_hub or dataset in STDLIB_SHARES):
        raise UserError(f"{dataset} has a source of its own; give the files another name with --dataset=NAME")
    if not files and not on_hub and dataset not in ("", *STDLIB_SHARES):
        known = ", ".join(["ORG/NAME", *STDLIB_SHARES, *HUB])
        raise UserError(f"no source for {dataset!r}: give --files='a.txt,dir/*.md', or a data set of {known}")
    name = (dataset or ("files" if files else "stdlib")).partition("@")[0].split("/")[-1]
    if not name or name.startswith("."):
        raise UserError(f"--dataset={dataset} does not end in a name for a folder in data/")
    if re.search(r"\s", split_on):
        raise UserError(f"--split_on={split_on!r} must not have white space in it")
    made = make_tokenizer(tokenizer or ("gpt2" if on_hub else "bytes"))
    origin = f"{HUB.get(dataset, dataset)} {split} {folder}".rstrip() if on_hub else files
    origin = origin or f"stdlib of Python {sys.version.split()[0]}"
    meta = dict(tokenizer=made.name, vocab_size=made.vocab_size, eot=made.eot, source=origin, asked_tokens=tokens,
                val_every=val_every, column=column or ("input_ids" if made.encode is None else ""), rows=rows,
                split_on=split_on)
    if made.sha256:
        meta |= dict(tokenizer_sha256=made.sha256, tokenizer_probe=made.fingerprint())
    if on_hub:  # main lists its files, if it needs them
        return name, None, made, meta
    sources = local_sources(files, split) if files else stdlib_sources(name)
    meta["files_sha256"] = hashlib.sha256(repr(sources).encode()).hexdigest()  # names, sizes and times
    return name, sources, made, meta


def is_prepared(done, meta):
    """Whether the folder is there, whole, and made with these settings of these files. UserError if with others."""
    path = os.path.join(done, "meta.json")
    if not os.path.exists(path):
        return False
    with reading(path, "--force begins anew"):
        old = read_json(path)
        changed = [key for key in meta if key in old and old[key] != meta[key]]
        if changed:
            raise UserError(f"{done} was made with other settings or files ({', '.join(changed)}): --force begins anew")
        train, val = old["train"]["tokens"], old["val"]["tokens"]
        if [os.path.getsize(os.path.join(done, which)) for which in TOKEN_FILES[:2]] != [2 * train, 2 * val]:
            raise ValueError("the token files have other sizes")
    print(f"{done} is prepared already: {train:,} train and {val:,} val tokens (--force redoes it)")
    return True


def clear(half, keep=()):
    """Remove our files from an unfinished folder, its mark last, and the folder if it is empty then."""
    ours = [name for name in os.listdir(half) if OURS.fullmatch(name) and name not in keep]
    remove_files(half, sorted(ours, key="meta.json".__eq__))
    remove_empty(half)


def prepare(half, sources, made, meta):
    """Write the token files and meta.json into the unfinished folder. Returns meta.json."""
    try:
        pairs, every, share = with_val(sources, made.name)
        parts = make_parts(half, pairs, made)
        splits = join(half, parts, every, share, made.eot)
    except UserError as e:
        if any(file.endswith(".npy") and not file.startswith(".") for file in os.listdir(half)):
            raise UserError(f"{e}; once that is mended, the same command continues") from None
        clear(half)
        raise
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues")
    if not splits["train"]["tokens"] + splits["val"]["tokens"]:
        clear(half)
        raise UserError(f"there is no document in {meta['source']}")
    write_json(os.path.join(half, "meta.json"), meta | splits)
    return meta | splits


def main():
    configure(globals(), sys.argv[1:], __doc__, choices=dict(rows=("", "documents", "windows")))
    name, sources, made, meta = request()
    done = os.path.join("data", name)
    half = unfinished(done)
    if not force and is_prepared(done, meta):
        return say_next(next_command(name, made))
    check_folder(done, TOKEN_FILES, ["meta.json"])
    if sources is None:
        sources = hub_sources(HUB.get(dataset, dataset), split, folder)
    with on_disk(f"can't write {half}"):
        os.makedirs(half, exist_ok=True)
    lock = FolderLock(half)  # noqa: F841  held to the end: two preparations at once would mix their files
    check_folder(half, list(filter(OURS.fullmatch, os.listdir(half))), ["meta.json", ".meta.json.unfinished"])
    write_json(os.path.join(half, "meta.json"), meta)
    with interruptible():
        meta = prepare(half, sources, made, meta)
    with on_disk(f"can't write {done}"):
        clear(half, TOKEN_FILES)
        remove_files(done, TOKEN_FILES)  # meta.json last: until then it is ours
        remove_empty(done)
        os.rename(half, done)
    say_what_is_there(done, made, meta)
    if val_every != 1:
        say_next(next_command(name, made))


if __name__ == "__main__":
    main()
