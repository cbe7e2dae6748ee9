"""
Where documents come from: the standard library, text files, rows of .parquet and .jsonl files, here
or on a hub.

A source is a file with a name; a hub's is fetched when it is reached. Its documents come as Pieces.
"""
import glob
import gzip
import os
import re
import sysconfig
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import pyarrow.parquet as pq

from parts import jsonfile
from parts.errors import UserError, first_line, waiting_for

# A line here makes a name for prepare_owt.py and eval.py. What they fetch by it is the split `train`, as
# GPT-2's tokens; how much of it eval.py takes, eval.py's PUBLISHED says.
HUB = {
    "owt": "Skylion007/openwebtext",
    "pile": "apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2",
    "pile-filtered": "lucabaroni/apollo-pile-filtered-10k",
}
ROWS = (".parquet", ".jsonl", ".jsonl.gz", ".json")  # files whose rows are documents
LONGEST = 100_000_000  # bytes of a row of JSON
PIECE = 1_000_000  # bytes of a text file that are read at a time
# Where a text can be cut without a change to its tokens: a token of GPT-2's has no white space after
# something else, but for \xa0.
GPT2_SEAM = re.compile(rb"[^\s\xa0](?=[ \t\n\r])")
ANY_SEAM = re.compile(b"")  # of bytes
NO_SEAM = re.compile(b"(?!)")  # of a tokenizer that is not known: the text is taken whole


@dataclass
class Source:
    name: str
    size: int  # bytes
    fetch: Callable[[], str]  # gives the path of the file, here
    version: str = ""  # another one where the file is another

    @property
    def is_rows(self):
        return self.name.endswith(ROWS)


@dataclass
class Piece:
    """A document, or a part of a large one."""

    content: str | bytes | list[int]  # text, or token ids
    ends: bool  # whether the document ends with it
    taken: int  # rows or bytes of the file, with this one
    share: float  # of the file, with this one
    val: bool | None = None  # of a text file that is cut: whether it is the end that goes to val
    last: bool = False  # of its text file
    packed: bool = False  # a window of a stream of documents, which holds their end-of-text


# --- which files


def stdlib_sources():
    """The standard library's .py files, without tests, installed packages and caches, sorted."""
    root = sysconfig.get_path("stdlib")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = []
    for below, folders, names in os.walk(root):
        folders[:] = [folder for folder in folders if folder not in skip]
        for name in names:
            path = os.path.join(below, name)
            if name.endswith(".py"):
                found.append(local_source(os.path.relpath(path, root).replace(os.sep, "/"), path))
    return sorted(found, key=lambda source: source.name)


def local_sources(patterns):
    """The files that the comma-separated patterns match, sorted. UserError if one matches none."""
    found = set()
    for pattern in filter(None, patterns.split(",")):
        paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not paths:
            raise UserError(f"--files: no file matches {pattern!r}")
        found.update(paths)
    return [local_source(path, path) for path in sorted(found)]


def local_source(name, path):
    return Source(name, os.path.getsize(path), lambda: path, str(os.stat(path).st_mtime_ns))


def hub_sources(repo, split, folder):
    """A hub data set's files of the split, in their order. UserError.

    `datasets` no longer runs loading scripts: where a repository holds nothing else, the files are
    those of the hub's own conversion to parquet."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    repo, _, revision = repo.partition("@")
    try:
        rows = hub_rows(repo, revision or "main", folder)
        found = [f for f in rows if re.search(rf"(^|[/_.-]){split}([/_.-]|$)", f.path)]
        if not rows and not revision:
            revision = "refs/convert/parquet"
            rows = hub_rows(repo, revision, folder)
            found = [f for f in rows if re.search(rf"/(partial-)?{split}/", f.path)]
    except Exception as e:  # of many kinds
        raise UserError(f"{repo} can't be listed on {constants.ENDPOINT}: {first_line(e)}; without a network, "
                        "bring its files here and run with --files='*.parquet' --tokenizer=gpt2 "
                        "--dataset=NAME") from None
    if not found and split == "train":
        found = rows  # of a repository without splits
    if not found:
        below = f" below {folder!r}" if folder else ""
        raise UserError(f"{repo} has no {' or '.join(ROWS)} file of the split {split!r}{below}")
    folders = set()
    for f in found:
        below = os.path.dirname(f.path)
        folders.add(below.replace("/partial-" + split, "").replace("/" + split, ""))
    if len(folders) > 1:
        first, *others = sorted(folders)
        raise UserError(f"{repo} has the split {split!r} in several folders: "
                        f"choose one with --folder={first} (or {', '.join(others[:4])})")

    def fetch(f):
        with waiting_for(constants.ENDPOINT):
            try:
                path = hub.hf_hub_download(repo, f.path, revision=revision or "main", repo_type="dataset")
            except OSError:
                raise
            except Exception as e:  # of the library's transport
                raise OSError(f"{f.path} can't be fetched: {first_line(e)}") from None
        if os.path.getsize(path) != f.size:
            raise OSError(f"{path} has {os.path.getsize(path):,} bytes, and {constants.ENDPOINT} lists {f.size:,}")
        return path

    return [Source(f.path, f.size, partial(fetch, f), str(getattr(f, "blob_id", ""))) for f in found]


def hub_rows(repo, revision, folder):
    import huggingface_hub as hub
    from huggingface_hub import constants

    with waiting_for(constants.ENDPOINT):
        tree = list(hub.HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset"))
    found = [f for f in tree if hasattr(f, "size") and f.path.endswith(ROWS) and f.path.startswith(folder)]
    return sorted(found, key=lambda f: f.path)


# --- rows


def read_rows(path, skip, column, without):
    """Yields the rows of a file from row `skip` on, a Piece each. column: of the documents; without:
    the Pile's subsets to leave out, by a row's meta. UserError: no such column, or no document in it.

    Lists of ids that all have one length are windows, cut out of a stream of documents."""
    open_file = open_parquet if path.endswith(".parquet") else open_json
    names, total, rows_with = open_file(path)
    name = column or ("text" if "text" in names else "input_ids")
    if name not in names:
        raise UserError(f"{path} can't be read: no column {column or 'text'!r}: "
                        f"choose one of {', '.join(names)} with --column")
    if without and "meta" not in names:
        raise UserError(f"{path} can't be read: --without needs a column meta with pile_set_name, "
                        "as the Pile's text has")
    wanted = [name, "meta"] if without else [name]
    rows = rows_with(wanted)
    first = list(islice(rows, 1000))
    lengths = [len(row[name]) for row in first if isinstance(row.get(name), list)]
    window = max(lengths, default=0)
    packed = lengths.count(window) > 1 and set(lengths) <= {0, window}
    size, characters = os.path.getsize(path), 0
    for n, row in enumerate(chain(first, rows), 1):
        content = row.get(name)
        if content is None:
            content = [] if lengths else ""
        if not isinstance(content, (str, list)):
            raise UserError(f"{path} can't be read: row {n} of column {name!r} is neither text "
                            f"nor a list of token ids: {str(content)[:40]}")
        characters += len(content)
        if packed and len(content) not in (0, window) and n != total:
            raise UserError(f"{path} can't be read: row {n} has {len(content)} ids, and those before it {window} "
                            "each: are they windows of a stream, or documents? Give them as two data sets")
        if n <= skip or (without and pile_subset(path, row.get("meta")) in without.split(",")):
            continue
        share = n / total if total else min(1.0, characters / size)
        yield Piece(content, True, n, share, packed=packed)


def open_parquet(path):
    """(names of its columns, number of rows, a function: wanted names -> iterator of rows). A row is a
    dict of at least the wanted columns."""
    with refusing(path):
        file = pq.ParquetFile(path)

    def rows_with(wanted):
        with refusing(path):
            for group in range(file.num_row_groups):  # one at a time in memory
                for batch in file.iter_batches(1000, row_groups=[group], columns=wanted):
                    yield from batch.to_pylist()

    return file.schema_arrow.names, file.metadata.num_rows, rows_with


def open_json(path):
    """As open_parquet, of a file of JSON rows, one on each line or all in one list; their number is not known: None.
    Its columns are those of the first row; a later row may lack one."""
    rows = json_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} can't be read: it has no rows")
    return list(first), None, lambda wanted: chain([first], rows)


def json_rows(path):
    open_file = gzip.open if path.endswith(".gz") else open
    with refusing(path), open_file(path, "rb") as f:
        n = 0
        while line := f.readline(LONGEST):
            n += 1
            if not line.strip():
                continue
            if len(line) == LONGEST:
                raise ValueError(f"line {n} is longer than {LONGEST:,} bytes")
            try:
                is_list = n == 1 and path.endswith(".json") and line.lstrip()[:1] == b"["
                found = jsonfile.parse(line + f.read() if is_list else line)
            except ValueError as e:
                raise ValueError(f"JSON parse error in line {n}: {e}") from None
            for row in found if is_list else [found]:
                if not isinstance(row, dict):
                    raise ValueError(f"line {n} holds no row but {jsonfile.shown(row)}")
                yield row


@contextmanager
def refusing(path):
    """Around reading a file: what pyarrow and datasets say of one that they can't read is the user's to
    mend."""
    try:
        yield
    except Exception as e:  # of many kinds, EOFError and KeyError among them
        problem = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path} can't be read: {problem[:200]}") from None


def pile_subset(path, meta):
    """A row's meta, a dict or JSON -> the Pile's name of its subset, or None."""
    if isinstance(meta, str):
        try:
            meta = jsonfile.parse(meta)
        except ValueError:
            raise UserError(f"{path} can't be read: its column meta is not JSON: {meta[:40]}") from None
    return meta.get("pile_set_name") if isinstance(meta, dict) else None


# --- text files


def read_text(path, skip, val_share, seam):
    """Yields a text file from byte `skip` on, in Pieces of about PIECE bytes, so that a file of any size
    fits into memory. They begin at seams, so that their tokens are the whole's. Its last val_share,
    above 0, is a document of its own, for val."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        documents = [(0, size, None)]  # (begin, end, val)
        if val_share:
            border = val_border(f, size, val_share, GPT2_SEAM if seam is NO_SEAM else seam)
            documents = [(0, border, False), (border, size, True)]
        for begin, end, val in documents:
            if begin < skip and end <= skip:
                continue
            at, part = max(begin, skip), b""  # part: what is read and not yielded; it begins at `at`
            f.seek(at)
            while more := f.read(min(PIECE, end - at - len(part))):
                part += more
                near_end = max(0, len(part) - 4096)
                seams = [found.end() for found in seam.finditer(part, near_end)]
                if seams and at + len(part) < end:
                    at += seams[-1]
                    yield Piece(part[: seams[-1]], False, at, at / size, val)
                    part = part[seams[-1] :]
            yield Piece(part, True, end, end / max(1, size), val, last=(begin, end, val) == documents[-1])


def val_border(f, size, share, seam):
    """Where the last share begins: not within a token or, where there is no seam, within a letter."""
    border = size - int(size * share)
    f.seek(border)
    ahead = f.read(PIECE)
    found = seam.search(ahead) or re.match(rb"[\x80-\xbf]*", ahead)
    return border + found.end()
