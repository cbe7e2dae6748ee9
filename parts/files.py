"""
What may be replaced on the disk: what we wrote, and nothing else. And files that are there whole or
not at all.
"""
import json
import os
from contextlib import contextmanager

from parts.errors import UserError, on_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUN_FILES = ("settings.json", "ckpt.pt", "log.jsonl", "model")
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


def check_out_dir(out_dir, init_from, force):
    """UserError unless a run may write into out_dir: it is new or empty, or holds the run to be resumed,
    or with force an earlier one; and the model it starts from is elsewhere."""
    if not out_dir:
        raise UserError("out_dir is empty: name a folder for what the run leaves")
    places = os.path.realpath(out_dir), os.path.realpath(os.path.join(out_dir, "model"))
    if os.path.realpath(init_from) in places:
        raise UserError(f"init_from {init_from} is in out_dir {out_dir}, where this run's own model would replace it: "
                        "choose another out_dir")
    if os.path.isdir(out_dir) and os.listdir(out_dir) and not is_run(out_dir):
        raise UserError(f"out_dir {out_dir} holds files, and is not an earlier run's: choose a new one")
    for name in RUN_FILES:
        if os.path.islink(os.path.join(out_dir, name)):
            raise UserError(f"{os.path.join(out_dir, name)} is a link, and would be replaced: remove it, "
                            "or choose another out_dir")
    if init_from == "resume" or force:
        return
    if os.path.exists(os.path.join(out_dir, "model", "config.json")):
        raise UserError(f"out_dir {out_dir} holds a finished run: choose another, or replace it with --force")
    if os.path.exists(os.path.join(out_dir, "ckpt.pt")):
        raise UserError(f"out_dir {out_dir} holds a run that is not finished: go on with "
                        "--init_from=resume, or begin anew with --force")


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


def is_run(folder):
    """Whether a run of train.py wrote this folder: its settings.json, the first file of a run, says so."""
    return {"init_from", "ln_schedule"} <= read_dict(os.path.join(folder, "settings.json")).keys()


def check_file(path, keys):
    """UserError unless path may be replaced: it is not there, or is a JSON file with these keys, as
    ours have."""
    if os.path.lexists(path + ".tmp"):
        raise UserError(f"{path}.tmp is in the way: remove it, or name another file")
    if not os.path.lexists(path):
        return
    ours = os.path.isfile(path) and not os.path.islink(path) and set(keys) <= read_dict(path).keys()
    if not ours:
        raise UserError(f"{path} is there already and was not written here: name another file")


def read_dict(path):
    """The dict in a JSON file; {} if it is not there or holds something else."""
    try:
        with open(path) as f:
            content = json.load(f)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remove_files(folder, names):
    """Remove the files of these names, and the folder if nothing else is in it."""
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


@contextmanager
def whole_file(path):
    """A file to write bytes into, which takes its name when all is on the disk: what was there
    stays until then. UserError on a full disk and the like, with what was there untouched."""
    half = path + ".tmp"
    try:
        with on_disk(f"can't write {path}"):
            with open(half, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(half, path)
    except BaseException:
        if os.path.lexists(half):
            os.remove(half)
        raise


def write_json(path, content):
    with whole_file(path) as f:
        f.write(json.dumps(content, indent=2).encode())
