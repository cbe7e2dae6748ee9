"""
Where documents come from: the standard library, local files, or a data set on a hub. A file holds one text, or rows
whose column is text or token ids.
"""
import glob
import gzip
import hashlib
import os
import re
import sysconfig
from dataclasses import dataclass

from parts.errors import UserError, asking_hub, reading

# Names for prepare_owt.py and eval.py. They fetch the split `train`, as GPT-2's tokens; PUBLISHED in eval.py says how
# much of it.
HUB = {
    "owt": "Skylion007/openwebtext",
    "pile": "apollo-research/monology-pile-uncopyrighted-tokenizer-gpt2",
    "pile-filtered": "lucabaroni/apollo-pile-filtered-10k",
}
# files whose rows are documents, and what `datasets` calls their format
ROWS = dict(parquet="parquet", jsonl="json", ndjson="json", json="json", csv="csv", arrow="arrow")
STDLIB_SHARES = dict(stdlib_pretrain=(0.05, 0.525), stdlib=(0.525, 1))  # below 0.05: val of both
PIECE = 1_000_000  # bytes of a text file that are read at a time
LARGEST_WHOLE = 20_000_000  # bytes of a text that can't be cut; tokenizing takes about 160 bytes of memory a byte
# Seams: where a text can be cut without changing its tokens. No token of GPT-2 has white space after another character,
# except \xa0.
GPT2_SEAM = re.compile(rb"[^\s\xa0](?=[ \t\n\r])")
ANY_SEAM = re.compile(b"")  # for the tokenizer `bytes`
NO_SEAM = re.compile(b"(?!)")  # for any other tokenizer
BINARY = re.compile(rb"%PDF|BZh|\x28\xb5\x2f\xfd|\xfd7zXZ")  # first bytes of files that may have no zero byte


@dataclass(frozen=True)
class Source:
    """A file, here or on a hub."""

    name: str
    path: str  # local, or in the repository
    size: int  # bytes
    version: str  # changes when the file does
    repo: str = ""
    revision: str = ""

    @property
    def rows_format(self):
        """The format of a file of rows, as `datasets` calls it; None for a text file."""
        return ROWS.get(re.sub(r"\.(gz|zst)$", "", self.name.lower()).rpartition(".")[2])

    def fetch(self):
        """The local path of the file; that of a hub is in the cache. UserError."""
        if not self.repo:
            return self.path
        import huggingface_hub as hub

        for again in (False, True):  # a cached file of another size is fetched again
            with asking_hub(f"{self.path} can't be fetched from"):
                path = hub.hf_hub_download(self.repo, self.path, revision=self.revision, repo_type="dataset",
                                           force_download=again)
            if os.path.getsize(path) == self.size:
                return path
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes, and the hub lists {self.size:,}")


@dataclass
class Piece:
    """A document, or a part of a large one."""

    name: str  # the source's name and the row, for messages
    content: bytes | list[int]  # text in UTF-8, or token ids
    ends: bool = True  # a document ends with it
    last: bool = True  # a row or a text file ends with it
    val: bool | None = None  # None: a row; its index in the data set decides
    window: bool = False  # ids cut from a stream of documents, with end-of-text among them


# --- which files


def place(name):
    """A hash of the name in [0, 1): a file stays in its split when others are added or removed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def stdlib_sources(dataset):
    """The standard library's .py files, without tests, installed packages and caches, sorted: those of val, and the
    half for fine-tuning (stdlib) or for pretraining the bundled model (stdlib_pretrain)."""
    root = sysconfig.get_path("stdlib")
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    begin, end = STDLIB_SHARES[dataset]
    names = [name.replace(os.sep, "/") for name in glob.glob("**/*.py", root_dir=root, recursive=True)]
    found = sorted(name for name in names if not skip & {*name.split("/")}
                   and (place(name) < 0.05 or begin <= place(name) < end))
    return [local_source(name, os.path.join(root, name)) for name in found]


def local_sources(patterns, split):
    """The files that the comma-separated patterns match, sorted. A folder that `datasets` saved counts as its files.
    UserError if a pattern matches none."""
    found = set()
    for pattern in filter(None, patterns.split(",")):
        matches = glob.glob(pattern, recursive=True)
        for folder in filter(os.path.isdir, list(matches)):
            saved = os.path.join(glob.escape(folder), "*.arrow"), os.path.join(glob.escape(folder), split, "*.arrow")
            matches += glob.glob(saved[0]) or glob.glob(saved[1])
        paths = [path for path in matches if not os.path.isdir(path)]
        if not paths:
            raise UserError(f"--files: no file matches {pattern!r}; of a folder, give a pattern, as 'folder/**/*.txt'")
        found.update(paths)
    return [local_source(path, path) for path in sorted(found)]


def local_source(name, path):
    with reading(path):
        stat = os.stat(path)
    return Source(name, path, stat.st_size, str(stat.st_mtime_ns))


def hub_sources(repo, split, folder):
    """A hub data set's files of the split, in their order. UserError.

    `datasets` no longer runs loading scripts. For a repository that holds nothing else, take the hub's own conversion
    to parquet."""
    repo, _, revision = repo.partition("@")
    in_split = rf"(^|[/_.-]){split}([/_.-]|$)"
    rows = hub_rows(repo, revision or "main", folder)
    if not rows and not revision:
        revision, in_split = "refs/convert/parquet", rf"/(partial-)?{split}/"
        rows = hub_rows(repo, revision, folder)
    found = [f for f in rows if re.search(in_split, f.path)]
    if not found and split == "train":
        found = rows  # a repository without splits
    if not found:
        below = f" below {folder!r}" if folder else ""
        raise UserError(f"{repo} has no file of the split {split!r}{below} in a format such as {', '.join(ROWS)}")
    folders = sorted({re.sub(rf"/(partial-)?{split}", "", os.path.dirname(f.path)) for f in found})
    if len(folders) > 1:
        raise UserError(f"{repo} has the split {split!r} in several folders: "
                        f"choose one with --folder={folders[0]} (or {', '.join(folders[1:5])})")
    return [Source(f.path, f.path, f.size, str(f.blob_id), repo, revision or "main") for f in found]


def hub_rows(repo, revision, folder):
    """The files of rows in a hub's repository, sorted. UserError."""
    import huggingface_hub as hub

    with asking_hub(f"{repo} can't be listed on", "without a network, bring its files here and run with "
                    "--files='*.parquet' --tokenizer=gpt2 --dataset=NAME"):
        tree = list(hub.HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset"))
    files = [f for f in tree if hasattr(f, "size") and f.path.startswith(folder.rstrip("/") + "/" if folder else "")]
    return sorted((f for f in files if Source(f.path, "", 0, "").rows_format), key=lambda f: f.path)


# --- rows


def read_rows(source, column, eot, are_windows):
    """Yields a Piece for each row of a file. column: "" for text, or input_ids if there is no text; are_windows: rows
    of ids are windows of a stream (True), documents (False), or what windows_or_documents finds (None). UserError."""
    path = source.fetch()
    with reading(source.name):
        first = next(batches(source, path), None)
        if first is None:
            return
        names = first.schema.names
        name = column or ("text" if "text" in names else "input_ids")
        if name not in names:
            raise ValueError(f"no column {name!r}: choose one of {', '.join(names)} with --column")

        def rows():
            for batch in batches(source, path, (name, "attention_mask")):
                kind = str(batch.schema.field(name).type)
                if "list" not in kind and kind not in ("string", "large_string", "string_view", "null"):
                    raise ValueError(f"column {name!r} is {kind}, neither text nor lists of token ids")
                for row in batch.to_pylist():
                    if "list" not in kind:
                        yield (row[name] or "").encode()
                    elif row.get("attention_mask"):
                        yield [i for i, real in zip(row[name], row["attention_mask"], strict=True) if real]
                    else:
                        yield row[name] or []

        for n, content in enumerate(rows(), 1):
            is_ids = isinstance(content, list)
            if is_ids and are_windows is None:
                are_windows = windows_or_documents(rows(), eot)
            yield Piece(f"{source.name}, row {n}", content, window=bool(is_ids and are_windows))


def batches(source, path, wanted=()):
    """Yields a file's rows as pyarrow record batches or tables, of the wanted columns that it has or of all. pyarrow
    reads parquet itself, because importing `datasets` takes seconds."""
    if source.rows_format == "parquet":
        import pyarrow.parquet as pq

        file = pq.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in wanted]
        for group in range(file.num_row_groups):  # one at a time in memory
            yield from file.iter_batches(1000, row_groups=[group], columns=columns or None)
        return
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # mixed types are an error, not JSON in place of the text; an empty cell or "NA" is text
    options = dict(json=dict(on_mixed_types=None), csv=dict(keep_default_na=False)).get(source.rows_format, {})
    stream = datasets.load_dataset(source.rows_format, data_files=os.path.abspath(path), split="train",
                                   streaming=True, **options)
    for table in stream.with_format("arrow").iter(1000):
        yield table.select([name for name in table.column_names if name in (wanted or table.column_names)])


def windows_or_documents(rows, eot):
    """True if rows of ids are windows cut from a stream, False if they are documents. Windows have end-of-text anywhere
    and mostly one length; documents have any length. ValueError if the rows look like neither or both."""
    lengths, marked, inside = [], True, False
    for ids in filter(None, rows):
        lengths.append(len(ids))
        marked &= eot in (ids[0], ids[-1])
        inside |= eot in ids[1:-1]
    longest = lengths.count(max(lengths, default=0))
    varied = longest <= max(2, len(lengths) // 100)
    if marked or (varied and not inside):
        return False
    if inside and not varied:
        return True
    raise ValueError(f"end-of-text {eot} is {'' if inside else 'not '}inside rows, and {longest:,} of {len(lengths):,} "
                     "have the longest length: are they --rows=documents or --rows=windows, of a stream?")


# --- text files


def read_text(source, val, seam):
    """Yields a text file in Pieces of about PIECE bytes, so that a file of any size fits into memory. They begin at
    seams, so that their tokens are the whole text's. val: True, False, or the share of the file, at its end, that
    becomes a val document. UserError."""
    open_text = gzip.open if source.path.lower().endswith(".gz") else open
    with reading(source.name), open_text(source.path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        head = f.read(8000)
        if b"\0" in head or BINARY.match(head):
            raise ValueError("it is not text: it holds zero bytes, or begins like a packed file or a PDF")
        if seam is NO_SEAM and size > LARGEST_WHOLE:
            raise ValueError(f"this tokenizer takes at most {LARGEST_WHOLE:,} bytes: give several files, or rows")
        documents = [(0, size, val)]
        if isinstance(val, float):  # cut at a seam or, if there is none, not within a UTF-8 character
            border = f.seek(size - int(size * val))
            ahead = f.read(PIECE)
            found = (GPT2_SEAM if seam is NO_SEAM else seam).search(ahead) or re.match(rb"[\x80-\xbf]*", ahead)
            border += found.end()
            documents = [(0, border, False), (border, size, True)]
        for at, end, is_val in documents:
            f.seek(at)
            part = b""  # what is read and not yielded
            while more := f.read(min(PIECE, end - at - len(part))):
                part += more
                near_end = max(0, len(part) - 4096)
                seams = [found.end() for found in seam.finditer(part, near_end)]
                if seams and at + len(part) < end:
                    at += seams[-1]
                    yield Piece(source.name, part[: seams[-1]], False, False, is_val)
                    part = part[seams[-1] :]
            yield Piece(source.name, part, True, end == size and is_val is documents[-1][2], is_val)
