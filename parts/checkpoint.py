"""
A run's folder: settings.json, ckpt.pt to resume from, log.jsonl with a line for each step and
event, and at the end model/.
"""
import json
import os
import shlex
import sys

import torch

from model import GPT, GPTConfig
from parts import ranks
from parts.errors import UserError, on_disk
from parts.files import FolderLock, read_dict, remove_files, whole_file, write_json
from parts.tokenizer import remove_copied_tokenizer

KEYS = {"model", "model_config", "ln_state", "optimizers", "step", "settings", "rng"}  # of a checkpoint


def open_run(out_dir, settings, resumed):
    """Make the folder of a run, or take over the one to be resumed or replaced, on rank 0. Returns its
    lock. settings.json marks the folder as a run's: it is written before anything else. UserError if
    another process holds the folder."""
    if ranks.RANK > 0:
        return None
    with on_disk(f"can't make {out_dir}"):
        os.makedirs(out_dir, exist_ok=True)
    lock = FolderLock(out_dir)
    # eval.py takes a model/ for that of a finished run, and its tokenizer for this one's
    model_directory = os.path.join(out_dir, "model")
    if os.path.exists(os.path.join(model_directory, "tokenizer.json")):
        earlier = read_dict(os.path.join(out_dir, "settings.json"))
        remove_copied_tokenizer(earlier.get("init_from", ""), model_directory)
    remove_files(model_directory, ["config.json", "model.safetensors"])
    write_json(os.path.join(out_dir, "settings.json"), settings)
    if not resumed:
        remove_files(out_dir, ["ckpt.pt", "log.jsonl"])
    return lock


def save(out_dir, step, model, optimizers, settings):
    """ckpt.pt before step `step`: all that a resume needs. All processes call it, and rank 0 writes;
    the old one stays until the new one is whole. UserError if it can't be written."""
    rng = ranks.gather(rng_state())
    if ranks.RANK > 0:
        return
    write(os.path.join(out_dir, "ckpt.pt"), dict(
        model=model.state_dict(),
        model_config=vars(model.config),
        ln_state=model.ln_state(),  # modes, constants and treatments, which the state dict leaves out
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        step=step,  # with the seed, it says which tokens come next
        settings=settings,
        rng=rng,  # of dropout, for each process
    ))


def write(path, checkpoint):
    try:
        with whole_file(path) as f:
            torch.save(checkpoint, f)
    except (UserError, RuntimeError) as e:
        # torch wraps a full disk's OSError in its own error: show the cause
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"can't save {path}: {str(cause).splitlines()[0]}; "
                        "an older checkpoint there is untouched") from None


def load(out_dir):
    """The dict that save wrote, on the CPU. UserError if it is not one; no code in it is run."""
    path = os.path.join(out_dir, "ckpt.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"nothing to resume: {path} is not there") from None
    except Exception as e:  # torch.load raises many kinds
        raise UserError(f"{path} is not a whole checkpoint, cut short or not ours ({type(e).__name__})") from None
    missing = KEYS - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: it has no {', '.join(sorted(missing))}")
    return checkpoint


def load_model(checkpoint, dropout):
    """The GPT of what load returned, with its modes, constants and treatments."""
    model = GPT(GPTConfig(**checkpoint["model_config"] | dict(dropout=dropout)))
    model.load_state_dict(checkpoint["model"])
    model.load_ln_state(checkpoint["ln_state"])
    return model


def load_optimizers(optimizers, checkpoint):
    """Their momenta; the learning rate, decay and betas stay those of today's settings."""
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))


def changed_settings(settings, checkpoint):
    """A line that says which settings are not those of the checkpoint; empty if none."""
    old = checkpoint["settings"]
    changed = []
    for key in old:
        if key != "out_dir" and settings.get(key) != old[key]:
            changed.append(f"{key} {old[key]!r} -> {settings.get(key)!r}")
    return "note: not as in the checkpoint: " + ", ".join(changed) if changed else ""


def rng_state():
    """Of dropout: the only random numbers that a step draws."""
    state = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(states):
    """This process's own, where the checkpoint has it."""
    if ranks.RANK >= len(states):
        return
    state = states[ranks.RANK]
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class Log:
    """log.jsonl, on rank 0: a line of JSON for each step, evaluation and event, and each with its
    "step". With wandb, a module whose init has been called, it gets the same."""

    def __init__(self, out_dir, start, wandb=None):
        self.file = None
        self.wandb = wandb
        if ranks.RANK > 0:
            return
        path = os.path.join(out_dir, "log.jsonl")
        lines = lines_before(path, start)  # a resume repeats what came after its checkpoint
        with whole_file(path) as f:
            f.writelines(line.encode() for line in lines)
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


def lines_before(path, start):
    """The whole lines of a log.jsonl that are of steps before `start`. UserError if it is not a log."""
    if start == 0 or not os.path.exists(path):
        return []
    with on_disk(f"can't read {path}"), open(path) as f:
        try:
            return [line for line in f if line.endswith("\n") and json.loads(line)["step"] < start]
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is not a log of train.py ({type(e).__name__}: {e}): "
                            "move it away to go on without it") from None


def resume_command():
    """What to type to go on with this run."""
    return command([*sys.argv, "--init_from=resume"])


def next_command(settings, removed):
    """What to type after a finished run. removed: whether some site of its model is fake."""
    out_dir, init_from = settings["out_dir"], settings["init_from"]
    if not removed and init_from == "scratch":
        flags = f"--init_from={out_dir}/model --dataset={settings['dataset']}"
        return f"python train.py config/remove_ln_mine.py {flags}"
    run = out_dir.removesuffix("_control")
    if removed and not os.path.isdir(run + "_control/model"):
        again = [arg for arg in sys.argv if arg not in ("--force", "--init_from=resume")]
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


def model_directory(source):
    """A run's out_dir -> its model/; any other source -> itself. UserError: a run that has not
    finished."""
    if os.path.exists(os.path.join(source, "model", "config.json")):
        return os.path.join(source, "model")
    if not os.path.exists(os.path.join(source, "ckpt.pt")):
        return source
    real = [name for name, site in load(source)["ln_state"]["sites"].items() if site["mode"] == "real"]
    problem = f"still real are {', '.join(real)}" if real else "it has no model/"
    raise UserError(f"{source} is not finished: {problem}; go on with --init_from=resume")


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
