"""
A preparation's folders: data/NAME.tmp while it is under way, with a progress.json from which the same
command goes on after a kill at any moment; and data/NAME, when it is whole.

Progress is a dict: meta, as in meta.json; position, [source, rows or bytes of it, documents]: what is taken; documents;
train and val, each the counts of that split; redo, the same four before the source that is being read; sources, a
fingerprint.
"""
import hashlib
import json
import os

from parts import jsonfile
from parts.errors import UserError
from parts.files import TOKEN_FILES, remove_files, write_json

DONE_FILES = (*TOKEN_FILES, "progress.json", "replaced")  # the last two for a moment, at the end
HALF_FILES = (*DONE_FILES, "val_ordered.bin", "progress.json.tmp", "meta.json.tmp", "val_ordered.bin.tmp")
STATE = ("position", "documents", "train", "val")
NOTHING = dict(tokens=0, documents=0, eot_appended=0)  # counts of a split
# jsonfile's kinds of what earlier runs left
COUNT = (0, 2**53)
WHOLE = dict(train={"tokens": COUNT, "documents?": COUNT}, val={"tokens": COUNT, "documents?": COUNT})
UNFINISHED = dict(meta=dict, sources=list, redo=dict)
ANEW = "--force begins anew"


# --- under way


def beginning(meta):
    state = dict(position=[0, 0, 0], documents=0, train=dict(NOTHING), val=dict(NOTHING))
    return dict(state, meta=meta, redo=state)


def written(progress):
    """Tokens so far."""
    return progress["train"]["tokens"] + progress["val"]["tokens"]


def after_batch(progress, position, encoded):
    """What changes in a progress with a batch: {"train" and "val": (bytes, their counts)}, up to the position."""
    before = {key: progress[key] for key in STATE}
    after = dict(before, position=position)
    for which, (_, counts) in encoded.items():
        after[which] = {key: before[which][key] + counts[key] for key in counts}
        after["documents"] += counts["documents"]
    if position[0] > before["position"][0]:  # another source is begun
        after["redo"] = dict(before if position[1] else after)
    return after


def note(half, out, progress, sources):
    """How far all is on the disk, so that a kill loses only what came after it."""
    for f in out.values():
        f.flush()
        os.fsync(f.fileno())
    progress["sources"] = fingerprint(sources, progress["position"][0])
    write_json(os.path.join(half, "progress.json"), progress)


def fingerprint(sources, i):
    """Two hashes, of the i-th source and of those before it: their names, sizes and times. A resume must find the
    same."""
    each = [[source.name, source.size, source.version] for source in sources]
    parts = each[i : i + 1], each[:i]
    return [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in parts]


def resume(half, meta, sources, force):
    """The progress of an earlier try for the same, or the beginning. UserError: what is there is of other files or
    settings, or can't be read; with force it is begun anew."""
    path = os.path.join(half, "progress.json")
    if not os.path.exists(path):
        return beginning(meta)
    try:
        old = read_progress(path)
        current, before = fingerprint(sources, old["position"][0])
        changed = [key for key in meta if meta[key] != old["meta"].get(key)]
        if changed or old["sources"][1:] != [before]:
            raise UserError(f"{half} holds {written(old):,} tokens that were prepared with other "
                            f"{', '.join(changed) or 'files'}: {ANEW}")
    except UserError:
        if force:
            return beginning(meta)
        raise
    if old["sources"][0] != current:
        print("note: what was being read then has changed, and is read anew")
        old |= old["redo"]
    print(f"resuming after {written(old):,} tokens")
    return old


def read_progress(path):
    """A progress.json. UserError if it is none."""
    progress = jsonfile.read(path, UNFINISHED, ANEW)
    counts = dict.fromkeys(NOTHING, COUNT)
    for state in (progress, progress["redo"]):
        jsonfile.check(path, state, dict(position=list, documents=COUNT, train=counts, val=counts), ANEW)
        if len(state["position"]) != 3 or not all(jsonfile.fits(n, COUNT) for n in state["position"]):
            raise UserError(f"{path}: position is no position: {ANEW}")
    return progress


def open_token_files(half, progress, sources):
    """{"train" and "val": a file to append to}, without what a kill left in it after the last note, in a folder that is
    marked as ours and as not whole. UserError: less is there than was noted."""
    for name in ("meta.json", "val_ordered.bin"):  # of another try; they would be taken for this one's
        if os.path.exists(os.path.join(half, name)):
            os.remove(os.path.join(half, name))
    note(half, {}, progress, sources)
    out = {which: open(os.path.join(half, which + ".bin"), "ab") for which in ("train", "val")}
    for which, f in out.items():
        if os.path.getsize(f.name) < 2 * progress[which]["tokens"]:
            raise UserError(f"{f.name} is shorter than progress.json says: {ANEW}")
        f.truncate(2 * progress[which]["tokens"])
    return out


# --- whole


def finish(half, meta, progress):
    """All documents are in the unfinished folder: say so in its meta.json, which holds what is returned."""
    ordered = os.path.join(half, "val_ordered.bin")
    val = ordered if os.path.exists(ordered) else os.path.join(half, "val.bin")
    for which, path in dict(train=os.path.join(half, "train.bin"), val=val).items():
        with open(path, "rb") as f:
            meta[which] = progress[which] | dict(sha256=hashlib.file_digest(f, "sha256").hexdigest())
    write_json(os.path.join(half, "meta.json"), meta)
    return meta


def finished(half, meta, sources):
    """What finish has written before a kill, of a folder that has only to take its name. {} if there is none."""
    if not os.path.exists(os.path.join(half, "meta.json")):
        return {}
    try:
        found = jsonfile.read(os.path.join(half, "meta.json"), WHOLE, "")
        progress = read_progress(os.path.join(half, "progress.json"))
    except UserError:
        return {}
    same = all(found.get(key) == value for key, value in meta.items())
    return found if same and progress["sources"] == fingerprint(sources, progress["position"][0]) else {}


def take_name(half, done):
    """The unfinished folder takes its name. A kill at any moment leaves what can be done again."""
    ordered = os.path.join(half, "val_ordered.bin")
    if os.path.exists(ordered):
        os.replace(ordered, os.path.join(half, "val.bin"))
    remove_leftovers(done)
    if os.path.exists(done):
        os.rename(done, os.path.join(half, "replaced"))
    os.rename(half, done)
    remove_leftovers(done)


def remove_leftovers(done):
    """What take_name leaves when it is killed at its end."""
    remove_files(os.path.join(done, "replaced"), DONE_FILES)
    remove_files(done, ["progress.json"])


def is_prepared(done, meta):
    """Whether the folder holds just what is asked for. UserError if it holds something else."""
    path = os.path.join(done, "meta.json")
    if not os.path.exists(path):
        return False
    old = jsonfile.read(path, WHOLE, ANEW)
    for key, value in meta.items():
        if old.get(key) != value:
            raise UserError(f"{done} holds {key} {old.get(key)!r}, not {value!r}: --force replaces it")
    remove_leftovers(done)
    train, val = old["train"]["tokens"], old["val"]["tokens"]
    print(f"{done} is prepared already: {train:,} train and {val:,} val tokens (--force redoes it)")
    return True
