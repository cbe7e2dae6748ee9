"""
What may be replaced on the disk: what we wrote, and nothing else. And files that are there whole or
not at all.
"""
import json
import os
from contextlib import contextmanager

from parts import jsonfile
from parts.errors import UserError, on_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKEN_FILES = ("meta.json", "train.bin", "val.bin")


def check_folder(folder, names, marks):
    """UserError unless folder may be replaced: it is not there, is empty, or holds one of marks and
    only files of names."""
    if os.path.islink(folder):
        raise UserError(f"{folder} is a link, and would be replaced: give another name")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is a file: give another name")
    found = sorted(os.listdir(folder)) if os.path.exists(folder) else []
    strangers = [name for name in found if name not in names]
    if not strangers and not set(marks) & set(found):
        strangers = found
    if strangers:
        raise UserError(f"{folder} holds {strangers[0]}, which was not written here and would be lost: "
                        "give another name")


class FolderLock:
    """Keeps other processes' FolderLocks from a folder, as long as this object lives. UserError if
    another one holds it. On Windows it does nothing."""

    def __init__(self, folder):
        self.handle = None
        if fcntl is None:
            return
        self.handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process: wait for it, or choose another") from None
        except OSError:
            pass  # a file system without locks

    def __del__(self):
        if self.handle is not None:
            os.close(self.handle)


def run_settings(folder):
    """The settings.json of a folder that a run of train.py wrote: a run's first file. {} of any other folder."""
    fields = {"init_from": str, "ln_schedule": list, "dataset": str, "run?": str}
    try:
        return jsonfile.read(os.path.join(folder, "settings.json"), fields, "")
    except UserError:
        return {}


def check_file(path, keys):
    """UserError unless path may be replaced: it is not there, or is a JSON file with these keys, as
    ours have."""
    if os.path.lexists(path + ".tmp"):
        raise UserError(f"{path}.tmp is in the way: remove it, or name another file")
    if not os.path.lexists(path):
        return
    ours = os.path.isfile(path) and not os.path.islink(path) and set(keys) <= jsonfile.read_dict(path).keys()
    if not ours:
        raise UserError(f"{path} is there already and was not written here: name another file")


def remove_files(folder, names):
    """Remove the files of these names, and the folder if nothing else is in it."""
    for name in names:
        path = os.path.join(folder, name)
        if os.path.lexists(path) and (os.path.islink(path) or not os.path.isdir(path)):
            os.remove(os.path.join(folder, name))
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


@contextmanager
def whole_file(path, check=lambda half: None):
    """A file to write bytes into, which takes its name when all is on the disk and `check` has seen it there: what was
    there stays until then. UserError on a full disk and the like, with what was there untouched."""
    half = path + ".tmp"
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
