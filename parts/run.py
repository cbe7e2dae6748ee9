"""
A run's folder: settings.json, checkpoints, log.jsonl with a line for each step and event, and at the end model/. Checks
who owns the folder, and says what to type next.
"""
import hashlib
import json
import os
import re
import shlex
import sys

import torch

from model import GPT
from parts import checkpoint, ranks
from parts.errors import UserError, command, on_disk, reading
from parts.files import LARGEST_JSON, FolderLock, parse_json, remove_empty, remove_files, run_settings, unfinished
from parts.files import whole_file, write_json
from parts.tokenizer import remove_copied_tokenizer

# settings that may change when a run continues
NO_MATTER = ("out_dir", "force", "auto", "any_tokenizer", "eval_interval", "eval_iters", "checkpoint_interval",
             "log_interval", "max_bad_steps", "wandb_log", "wandb_project", "device", "dtype", "compile",
             "gradient_checkpointing")


# --- what may be in the folder


def check_out_dir(out_dir, init_from, teacher, force):
    """UserError unless a run may write into out_dir: it is new or empty, or holds the run to resume, or with force an
    earlier one; and the models that the run starts from are elsewhere."""
    if not out_dir:
        raise UserError("out_dir is empty: name a folder for the run")
    places = os.path.realpath(out_dir), os.path.realpath(os.path.join(out_dir, "model"))
    for name, source in dict(init_from=init_from, teacher=teacher).items():
        if source and os.path.realpath(source) in places:
            raise UserError(f"{name} {source} is in out_dir {out_dir}, and would be replaced: choose another out_dir")
    with on_disk(f"can't read {out_dir}"):
        inside = set(os.listdir(out_dir)) if os.path.lexists(out_dir) else set()
    ours = os.path.basename(unfinished("settings.json"))  # a kill in the first moment leaves it alone
    if inside - {ours} and not run_settings(out_dir):
        raise UserError(f"out_dir {out_dir} holds files that are not a run's: choose another")
    for name in ("settings.json", "log.jsonl", "model", *checkpoint.NAMES):
        if os.path.islink(os.path.join(out_dir, name)):
            raise UserError(f"{os.path.join(out_dir, name)} is a link, and would be replaced: choose another out_dir")
    finished = os.path.exists(os.path.join(out_dir, "model", "config.json"))
    if init_from != "resume" and not force and (finished or checkpoint.found(out_dir)):
        raise UserError(f"out_dir {out_dir} holds {'a finished' if finished else 'an unfinished'} run: choose another, "
                        "continue it with --init_from=resume, or replace it with --force")


def lock_run(out_dir):
    """On rank 0, the lock of a folder that exists, before it is read. UserError if another process holds it."""
    return FolderLock(out_dir) if ranks.RANK == 0 and os.path.isdir(out_dir) else None


def open_run(out_dir, settings, resumed, lock):
    """On rank 0, make the folder of a run, or take over the one to resume or replace. settings.json marks a folder as
    a run's, so it is written first. Returns the lock. UserError if another process holds the folder."""
    if ranks.RANK > 0:
        return None
    with on_disk(f"can't write {out_dir}"):
        os.makedirs(out_dir, exist_ok=True)
        lock = lock or FolderLock(out_dir)
        # eval.py would take an old model/ for a finished run's
        model_directory = os.path.join(out_dir, "model")
        before = run_settings(out_dir).get("init_from", "")
        if before not in ("", "scratch"):
            remove_copied_tokenizer(before, model_directory)
        remove_files(model_directory, ["config.json", "model.safetensors"])
        remove_empty(model_directory)
        remove_files(out_dir, [unfinished(name) for name in ("log.jsonl", "settings.json")])
        if resumed is None:
            remove_files(out_dir, [unfinished("ckpt.pt"), *checkpoint.NAMES, "log.jsonl"])
    write_json(os.path.join(out_dir, "settings.json"), settings)
    return lock


# --- which weights and settings


def weights_sha256(model):
    """A hash of all that makes a model's function: weights, modes, constants."""
    digest = hashlib.sha256(json.dumps([vars(model.config) | dict(dropout=0.0), model.ln_state()]).encode())
    for p in model.state_dict().values():
        digest.update(p.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def changed_settings(settings, resumed, but):
    """Settings that differ from the checkpoint's: "seed 1337 -> 7, ..."; empty if none does."""
    old = resumed["settings"]
    changed = [key for key in old if key not in but and settings.get(key) != old[key]]
    return ", ".join(f"{key} {old[key]!r} -> {settings.get(key)!r}" for key in changed)


def refuse_another_run(settings, resumed, out_dir):
    """UserError unless the checkpoint that init_from=auto found is of the run that the settings describe."""
    only_of_scratch = ("n_layer", "n_head", "n_embd", "bias") if settings["init_from"] != "scratch" else ()
    changed = changed_settings(settings, resumed, (*NO_MATTER, *only_of_scratch))
    if changed:
        raise UserError(f"{out_dir} holds another run ({changed}): pass --force, or continue with --init_from=resume")


# --- the log


class Log:
    """log.jsonl, on rank 0: a line of JSON for each step, evaluation and event, each with its "step". With wandb, a
    module whose init was called, it gets the same."""

    def __init__(self, out_dir, start, wandb=None):
        self.file = None
        self.wandb = wandb
        if ranks.RANK > 0:
            return
        path = os.path.join(out_dir, "log.jsonl")
        lines = []
        if start > 0 and os.path.exists(path):  # a resume repeats the steps after its checkpoint
            lines = [line for line, entry in log_entries(path) if entry["step"] < start]
        with whole_file(path) as f:
            f.writelines(lines)
        with on_disk(f"can't write {path}"):
            self.file = open(path, "a")

    def write(self, entry):
        if self.file is None:
            return
        with on_disk(f"can't write {self.file.name}"):
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(entry, step=entry["step"])


def log_entries(path):
    """Yields (line, entry) of a log.jsonl, without a last line that a kill cut. UserError names a bad line."""
    advice = "move it away to continue without it"
    with reading(path, advice), open(path, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(LARGEST_JSON), b""), 1):
            if not line.endswith(b"\n"):
                return
            with reading(f"{path}, line {n}", advice):
                entry = parse_json(line)
                numbers = [entry["step"], *(entry[key] for key in ("loss", "val_loss") if entry.get(key) is not None)]
                if not all(isinstance(number, (int, float)) for number in numbers):
                    raise ValueError(f"{numbers} are not numbers")
            yield line, entry


def start_wandb(project, out_dir, settings):
    """On rank 0, the wandb module with a run in it, the same one after a resume. UserError."""
    if ranks.RANK > 0:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs `pip install wandb`") from None
    try:
        wandb.init(project=project, name=os.path.basename(out_dir), config=settings, id=settings["wandb_id"],
                   resume="allow")
    except wandb.Error as e:
        raise UserError(f"wandb_log: {str(e).splitlines()[0]}") from None
    return wandb


# --- what to type next


def what_is_kept(out_dir):
    if not checkpoint.found(out_dir):
        return "There is no checkpoint yet: start again"
    return f"{checkpoint.found(out_dir)[0]} is from before: continue with --init_from=resume, or start again"


def resume_command():
    """The command that continues this run."""
    return as_typed([*sys.argv, "--init_from=resume"])


def control_command(out_dir):
    """The command of this run's control. Flags come after configs, so those that control.py changes are given again."""
    args = [arg for arg in sys.argv if not re.match(r"--force\b|--init_from=(resume|auto)$", arg)]
    first_flag = next((i for i, arg in enumerate(args) if arg.startswith("--")), len(args))
    again = {"--out_dir": f"{out_dir}_control", "--ln_schedule": "[]", "--aux_loss_weight": "0"}
    changed = [f"{key}={value}" for key, value in again.items() if any(arg.startswith(key) for arg in args)]
    control = os.path.join(os.path.dirname(args[0]), "config/control.py")
    return as_typed([*args[:first_flag], control, *args[first_flag:], *changed])


def as_typed(argv):
    """A command line of this script, with python or torchrun."""
    torchrun = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', ranks.WORLD)}"]
    return shlex.join([*(torchrun if ranks.WORLD > 1 else ["python"]), *argv])


def next_command(settings, removed):
    """What to type after a finished run. removed: whether its model lost a LayerNorm."""
    out_dir, init_from, data = settings["out_dir"], settings["init_from"], f"--dataset={settings['dataset']}"
    run = out_dir.removesuffix("_control")
    if removed and not os.path.isdir(run + "_control/model"):
        return control_command(out_dir) + "  (its control)"
    if os.path.isdir(run + "/model") and (removed or run != out_dir):
        return command("eval.py", run, data)
    if init_from == "scratch":
        return command("train.py", "config/remove_ln_mine.py", f"--init_from={out_dir}/model", data)
    return command("eval.py", f"--models={init_from},{out_dir}", data)


# --- models that a run or another script starts from


def load_teacher(source, model, block_size, role="teacher"):
    """The model with LN that `model` learns from or is compared with, frozen. UserError if it can't be."""
    if source == "scratch":
        raise UserError(f"there is no {role}: name one with --{role}")
    found = GPT.from_pretrained(model_directory(source)).eval().requires_grad_(False)
    config, vocab_size = found.config, model.config.vocab_size
    for wrong, problem in (
        (config.vocab_size != vocab_size, f"has a vocabulary of {config.vocab_size}, but the model of {vocab_size}"),
        (config.folded or found.any_removed(), "has lost its LayerNorms: name the model with LN"),
        (config.block_size < block_size, f"has {config.block_size} positions, fewer than {block_size}"),
    ):
        if wrong:
            raise UserError(f"{role} {source} {problem}")
    return found


def model_directory(source):
    """A run's out_dir -> its model/; any other source -> itself. UserError if the run has not finished."""
    if os.path.exists(os.path.join(source, "model", "config.json")):
        return os.path.join(source, "model")
    if not checkpoint.found(source):
        return source
    model, _ = checkpoint.load(source)
    reasons = ", ".join(model.why_not_ln_free()) or "it has no model/"
    raise UserError(f"{source} is not finished ({reasons}): continue it with --init_from=resume")
