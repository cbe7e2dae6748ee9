"""
A run's folder: settings.json, checkpoints to resume from, log.jsonl with a line for each step and
event, and at the end model/; whose folder it is, and what to type next.
"""
import hashlib
import json
import os
import shlex
import sys

import torch

from parts import jsonfile, ranks
from parts.checkpoint import checkpoint_names, load
from parts.errors import UserError, on_disk
from parts.files import FolderLock, remove_files, run_settings, whole_file, write_json
from parts.tokenizer import remove_copied_tokenizer

# settings that change no weight
NO_MATTER = ("out_dir", "force", "init_from", "eval_interval", "eval_iters", "checkpoint_interval", "keep_checkpoints",
             "log_interval", "max_bad_steps", "wandb_log", "wandb_project", "device", "dtype", "compile",
             "gradient_checkpointing", "run")


# --- what may be in the folder


def check_out_dir(out_dir, init_from, teacher, force):
    """UserError unless a run may write into out_dir: it is new or empty, or holds the run to be resumed,
    or with force an earlier one; and the models it learns from are elsewhere."""
    if not out_dir:
        raise UserError("out_dir is empty: name a folder for what the run leaves")
    places = os.path.realpath(out_dir), os.path.realpath(os.path.join(out_dir, "model"))
    for name, source in dict(init_from=init_from, teacher=teacher).items():
        if source and os.path.realpath(source) in places:
            raise UserError(f"{name} {source} is in out_dir {out_dir}, where this run's own model would replace it: "
                            "choose another out_dir")
    found = set(os.listdir(out_dir)) if os.path.isdir(out_dir) else set()
    if found - {"settings.json.tmp"} and not run_settings(out_dir):  # that is what a kill in the first moment leaves
        raise UserError(f"out_dir {out_dir} holds files, and is not an earlier run's: choose a new one")
    for name in ("settings.json", "log.jsonl", "model", *checkpoint_names(out_dir)):
        if os.path.islink(os.path.join(out_dir, name)):
            raise UserError(f"{os.path.join(out_dir, name)} is a link, and would be replaced: remove it, "
                            "or choose another out_dir")
    if init_from == "resume" or force:
        return
    if os.path.exists(os.path.join(out_dir, "model", "config.json")):
        raise UserError(f"out_dir {out_dir} holds a finished run: choose another, or replace it with --force")
    if checkpoint_names(out_dir):
        raise UserError(f"out_dir {out_dir} holds a run that is not finished: go on with "
                        "--init_from=resume, or begin anew with --force")


def lock_run(out_dir):
    """The lock of a folder that is there, on rank 0: before what is in it is read. UserError if another process holds
    it."""
    return FolderLock(out_dir) if ranks.RANK == 0 and os.path.isdir(out_dir) else None


def open_run(out_dir, settings, resumed, lock):
    """Make the folder of a run, or take over the one to be resumed or replaced, on rank 0. Returns its
    lock. settings.json marks the folder as a run's: in a new one it is written before anything else. UserError if
    another process holds the folder, or if what is to be resumed is of two runs."""
    if ranks.RANK > 0:
        return None
    with on_disk(f"can't make {out_dir}"):
        os.makedirs(out_dir, exist_ok=True)
    lock = lock or FolderLock(out_dir)
    if resumed:
        check_same_run(out_dir, settings["run"])
    # eval.py takes a model/ for that of a finished run, and its tokenizer for this one's
    model_directory = os.path.join(out_dir, "model")
    if os.path.exists(os.path.join(model_directory, "tokenizer.json")):
        remove_copied_tokenizer(run_settings(out_dir).get("init_from", ""), model_directory)
    remove_files(model_directory, ["config.json", "model.safetensors"])
    halves = [name + ".tmp" for name in ("ckpt.pt", "log.jsonl", "settings.json")]  # of a run that was killed
    for name in [*halves, *([] if resumed else [*checkpoint_names(out_dir), "log.jsonl"])]:
        path = os.path.join(out_dir, name)
        with on_disk(f"can't replace {path}"):
            if os.path.lexists(path):
                os.remove(path)
    write_json(os.path.join(out_dir, "settings.json"), settings)
    return lock


def check_same_run(out_dir, run):
    """UserError unless settings.json and log.jsonl are of the run whose checkpoint is resumed."""
    log = os.path.join(out_dir, "log.jsonl")
    of_log = [entry["run"] for _, entry in log_entries(log) if "run" in entry] if os.path.exists(log) else []
    for name, found in (("settings.json", run_settings(out_dir).get("run")), ("log.jsonl", (of_log or [None])[0])):
        if found not in (run, None):
            raise UserError(f"{out_dir}/{name} is of run {found}, and the checkpoint of run {run}: "
                            "begin anew with --force, or choose another out_dir")


# --- which run it is


def identity(settings, model):
    """16 letters that stand for a run: of the settings that change its weights, its data and the weights that it
    begins with. settings.json, every checkpoint, the log, the table and the card have them."""
    matter = {key: settings[key] for key in sorted(settings) if key not in NO_MATTER}
    text = json.dumps([matter, weights_sha256(model)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_sha256(model):
    """Of all that makes a model's function: weights, modes, constants."""
    digest = hashlib.sha256(json.dumps([vars(model.config) | dict(dropout=0.0), model.ln_state()]).encode())
    for p in model.state_dict().values():
        digest.update(p.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_another_run(settings, checkpoint, out_dir):
    """UserError unless a checkpoint that --init_from=auto has found is of the run that is asked for."""
    but = set(NO_MATTER) - {"init_from"}
    if settings["init_from"] != "scratch":
        but |= {"n_layer", "n_head", "n_embd", "bias"}  # which only `scratch` reads
    changed = changed_settings(settings, checkpoint, but)
    if changed:
        raise UserError(f"{out_dir} holds another run than is asked for ({changed}): begin anew with --force, "
                        "or go on with it all the same with --init_from=resume")


def changed_settings(settings, checkpoint, but=("out_dir", "run")):
    """Which settings are not those of the checkpoint: "seed 1337 -> 7, ..."; empty if none."""
    old = checkpoint["settings"]
    changed = []
    for key in old:
        if key not in but and settings.get(key) != old[key]:
            changed.append(f"{key} {old[key]!r} -> {settings.get(key)!r}")
    return ", ".join(changed)


def asks_auto(argv):
    return len(without_auto(argv)) < len(argv)


def without_auto(argv):
    """Arguments without --init_from=auto, which leaves init_from to what stands before it."""
    kept = []
    for arg in argv:
        if arg == "auto" and kept[-1:] == ["--init_from"]:
            kept.pop()
        elif arg != "--init_from=auto":
            kept.append(arg)
    return kept


# --- the log


class Log:
    """log.jsonl, on rank 0: a line of JSON for each step, evaluation and event, and each with its
    "step". With wandb, a module whose init has been called, it gets the same."""

    def __init__(self, out_dir, start, run, wandb=None):
        self.file = None
        self.wandb = wandb
        if ranks.RANK > 0:
            return
        path = os.path.join(out_dir, "log.jsonl")
        lines = lines_before(path, start)  # a resume repeats what came after its checkpoint
        with whole_file(path) as f:
            f.writelines(lines)
        with on_disk(f"can't write {path}"):
            self.file = open(path, "a")
        if start == 0:
            self.write(dict(step=0, run=run))

    def write(self, entry):
        if self.file is None:
            return
        with on_disk(f"can't write {self.file.name}"):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])


def log_entries(path):
    """Yields (line, entry) of a log.jsonl, each entry with its step; of a last line that a kill has cut, nothing.
    UserError if it is not a log."""
    kinds = {"step": (0, 2**53), "loss?": float, "val_loss?": float, "event?": str, "run?": str}
    return jsonfile.read_lines(path, kinds, "it is not a log of train.py; move it away to go on without it")


def lines_before(path, start):
    """The whole lines of a log.jsonl that are of steps before `start`, as bytes."""
    if start == 0 or not os.path.exists(path):
        return []
    return [line for line, entry in log_entries(path) if entry["step"] < start]


def start_wandb(project, out_dir, settings):
    """The wandb module with a run in it, on rank 0. UserError: not installed, not logged in, or no
    network."""
    if ranks.RANK > 0:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs `pip install wandb`") from None
    try:
        wandb.init(project=project, name=os.path.basename(out_dir), config=settings)
    except wandb.Error as e:
        raise UserError(f"wandb_log: {str(e).splitlines()[0]}") from None
    return wandb


# --- what to type next


def what_is_kept(out_dir):
    names = checkpoint_names(out_dir)
    if not names:
        return "There is no checkpoint yet: begin anew"
    return f"{out_dir}/{names[0]} stays as it was: go on from it with --init_from=resume, or begin anew"


def resume_command():
    """What to type to go on with this run."""
    return command([*without_auto(sys.argv), "--init_from=resume"])


def next_command(settings, removed):
    """What to type after a finished run. removed: whether some site of its model is fake."""
    out_dir, init_from = settings["out_dir"], settings["init_from"]
    if not removed and init_from == "scratch":
        flags = f"--init_from={out_dir}/model --dataset={settings['dataset']}"
        return f"python train.py config/remove_ln_mine.py {flags}"
    run = out_dir.removesuffix("_control")
    if removed and not os.path.isdir(run + "_control/model"):
        again = [arg for arg in without_auto(sys.argv) if arg not in ("--force", "--init_from=resume")]
        return command([*again, "config/control.py"]) + "  (its control)"
    if not removed and (run == out_dir or not os.path.isdir(run + "/model")):
        return f"python eval.py --models={init_from},{out_dir} --dataset={settings['dataset']}"
    if os.path.dirname(run) == "out":
        return "python eval.py"
    return f"python eval.py --models={init_from},{run}_control,{run} --dataset={settings['dataset']}"


def command(argv):
    """As it was typed: with python, or with torchrun."""
    launcher = ["python"]
    if ranks.WORLD > 1:
        launcher = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', ranks.WORLD)}"]
    return shlex.join([*launcher, *argv])


# --- for those that read a run


def model_directory(source):
    """A run's out_dir -> its model/; any other source -> itself. UserError: a run that has not
    finished."""
    if os.path.exists(os.path.join(source, "model", "config.json")):
        return os.path.join(source, "model")
    if not checkpoint_names(source):
        return source
    real = [name for name, site in load(source)["ln_state"]["sites"].items() if site["mode"] == "real"]
    problem = f"still real are {', '.join(real)}" if real else "it has no model/"
    raise UserError(f"{source} is not finished: {problem}; go on with --init_from=resume")
