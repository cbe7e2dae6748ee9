"""
What may be replaced on disk: what we wrote, and nothing else. Files that are whole or not there. JSON.
"""
import json
import os
import weakref
from contextlib import contextmanager

from parts.errors import UserError, on_disk, reading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LARGEST_JSON = 20_000_000  # bytes of a file or a line


# --- JSON


def parse_json(text):
    """JSON text -> its object, as a dict; NaN and Infinity become None. ValueError, RecursionError."""
    content = json.loads(text, parse_constant=lambda name: None)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def read_json(path, advice=""):
    """The object in a JSON file, as a dict. UserError ends with the advice."""
    with reading(path, advice), open(path, "rb") as f:
        return parse_json(f.read(LARGEST_JSON))


def read_dict(path):
    """The same; {} if the file is missing or holds anything else."""
    try:
        return read_json(path)
    except UserError:
        return {}


def run_settings(folder):
    """The settings.json of a folder that train.py wrote; {} for any other folder."""
    settings = read_dict(os.path.join(folder, "settings.json"))
    kinds = dict(init_from=str, ln_schedule=list, dataset=str)
    return settings if all(isinstance(settings.get(key), kind) for key, kind in kinds.items()) else {}


# --- writing


def unfinished(path):
    """The name under which path is written until it is whole. It begins with a dot, which no name of a user's data
    set or run does, so what is there is ours."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.unfinished")


@contextmanager
def whole_file(path, check=lambda half: None):
    """A file to write bytes into. It takes its name when it is on disk and `check` accepts it; until then the old file
    stays. UserError on a full disk and the like."""
    half = unfinished(path)
    try:
        with on_disk(f"can't write {path}"):
            with open(half, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            check(half)
            os.replace(half, path)
    except BaseException:
        if os.path.lexists(half):
            os.remove(half)
        raise


def write_json(path, content):
    with whole_file(path) as f:
        f.write(json.dumps(content, indent=2).encode())


# --- what may be replaced


def check_folder(folder, names, marks):
    """UserError unless folder may be replaced: it is missing, empty, or holds one of marks and only files of names."""
    if os.path.lexists(folder) and (os.path.islink(folder) or not os.path.isdir(folder)):
        raise UserError(f"{folder} is a file or a link: choose another name")
    found = sorted(os.listdir(folder)) if os.path.exists(folder) else []
    strangers = [name for name in found if name not in names]
    if not strangers and not set(marks) & set(found):
        strangers = found
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which was not written here: choose another name")


def check_file(path, keys):
    """UserError unless path may be replaced: it is missing, or is a JSON file of ours, with these keys."""
    ours = os.path.isfile(path) and not os.path.islink(path) and set(keys) <= read_dict(path).keys()
    if os.path.lexists(path) and not ours:
        raise UserError(f"{path} exists and was not written here: choose another name")


def remove_files(folder, names):
    """Remove the files of these names."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
            os.remove(path)


def remove_empty(folder):
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


class FolderLock:
    """Keeps other processes' FolderLocks from a folder while this object lives. UserError if another one holds it.
    On Windows it does nothing."""

    def __init__(self, folder):
        if fcntl is None:
            return
        handle = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another") from None
        except OSError:
            pass  # a file system without locks
