"""
What may be replaced on the disk: what we wrote, and nothing else. The scripts ask here before they begin.
"""
import json
import os

RUN_FILES = ("settings.json", "ckpt.pt", "log.jsonl", "model")
TOKEN_FILES = ("meta.json", "train.bin", "val.bin")


def check_folder(folder, names, marks):
    """ValueError, one line, unless folder may be replaced: it is not there, is empty, or holds one of marks and only files of names."""
    if os.path.islink(folder):
        raise ValueError(f"{folder} is a link, and would be replaced: give another name")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{folder} is a file: give another name")
    found = os.listdir(folder) if os.path.exists(folder) else []
    strangers = sorted(set(found) - set(names)) or (sorted(found) if found and not set(marks) & set(found) else [])
    if strangers:
        raise ValueError(f"{folder} holds {strangers[0]}, which was not written here and would be lost: give another name")


def remove_files(folder, names):
    """Remove the files of these names, and the folder if nothing else is in it."""
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    if os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)


def read_dict(path):
    """The dict in a JSON file; {} if it is not there or holds something else."""
    try:
        with open(path) as f:
            content = json.load(f)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_out_dir(out_dir, init_from):
    """ValueError, one line, unless a run may write into out_dir: it is new, empty or an earlier run's, and without the model it starts from."""
    model = os.path.join(out_dir, "model")
    if os.path.realpath(init_from) in (os.path.realpath(out_dir), os.path.realpath(model)):
        raise ValueError(f"init_from {init_from} is in out_dir {out_dir}, where this run's own model would replace it: choose another out_dir")
    if os.path.isdir(out_dir) and os.listdir(out_dir) and not {"init_from", "ln_schedule"} <= read_dict(os.path.join(out_dir, "settings.json")).keys():
        raise ValueError(f"out_dir {out_dir} holds files, and is not an earlier run's: choose a new one")
    for name in RUN_FILES:
        if os.path.islink(os.path.join(out_dir, name)):
            raise ValueError(f"{os.path.join(out_dir, name)} is a link, and would be replaced: remove it, or choose another out_dir")


def check_file(path, keys):
    """ValueError, one line, unless path may be replaced: it is not there, or is a JSON file with these keys, as ours have."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path) or not set(keys) <= read_dict(path).keys()):
        raise ValueError(f"{path} is there already and was not written here: name another file")
