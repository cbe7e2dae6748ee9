"""
A run's folder: settings.json, ckpt.pt to resume from, log.jsonl with a line for each step and
event, and at the end model/.
"""
import hashlib
import json
import os
import shlex
import sys
from dataclasses import fields
from zipfile import BadZipFile

import torch

from model import GPT, GPTConfig
from parts import hub, jsonfile, ranks
from parts.errors import UserError, on_disk
from parts.files import FolderLock, remove_files, run_settings, whole_file, write_json
from parts.tokenizer import remove_copied_tokenizer

# of a checkpoint; jsonfile.check's kinds
FIELDS = dict(model=dict, model_config=dict, ln_state=dict, optimizers=list, step=(0, 2**53), rng=list,
              settings={"init_from": str, "ln_schedule": list, "run?": str})
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


def checkpoint_names(out_dir):
    """The names of a folder's checkpoints, the newest first: ckpt.pt, ckpt-1.pt, ... A number after a gap is a user's
    own, but for the gap that a kill in `write` can leave."""
    names = ["ckpt.pt", *(f"ckpt-{n}.pt" for n in range(1, 100))]
    there = [os.path.lexists(os.path.join(out_dir, name)) for name in names]
    return [name for n, name in enumerate(names) if there[n] and (n < 3 or all(there[2:n]))]


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
        if os.path.lexists(os.path.join(out_dir, name)):
            os.remove(os.path.join(out_dir, name))
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


# --- checkpoints


def save(out_dir, step, model, optimizers, settings):
    """ckpt.pt before step `step`: all that a resume needs. All processes call it, and rank 0 writes;
    the old one stays until the new one is whole. UserError if it can't be written."""
    rng = ranks.gather(rng_state())
    if ranks.RANK > 0:
        return
    write(os.path.join(out_dir, "ckpt.pt"), settings["keep_checkpoints"], dict(
        model=model.state_dict(),
        model_config=vars(model.config),
        ln_state=model.ln_state(),  # modes, constants and treatments, which the state dict leaves out
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        step=step,  # with the seed, it says which tokens come next
        settings=settings,
        rng=rng,  # of dropout, for each process
    ))


def write(path, keep, checkpoint):
    """A checkpoint, which takes the name of the last one when it is whole and has been read again. Of those before
    it, keep - 1 stay, as ckpt-1.pt and so on; none goes before the new one has its name."""
    folder = os.path.dirname(path)

    def check_and_make_room(half):
        hub.check_parts(half)
        older = [name for name in checkpoint_names(folder) if name != "ckpt.pt"]
        for n, name in reversed(list(enumerate(older, 1))):
            os.replace(os.path.join(folder, name), os.path.join(folder, f"ckpt-{n + 1}.pt"))
        if os.path.exists(path):
            link_or_rename(path, os.path.join(folder, "ckpt-1.pt"))

    try:
        with whole_file(path, check_and_make_room) as f:
            torch.save(checkpoint, f)
        for name in checkpoint_names(folder)[keep:]:
            os.remove(os.path.join(folder, name))
    except (UserError, RuntimeError, ValueError, BadZipFile) as e:
        # torch wraps a full disk's OSError in its own error: show the cause
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"can't save {path}: {str(cause).splitlines()[0]}; "
                        "an older checkpoint there is untouched") from None


def link_or_rename(path, other):
    """A file gets another name, and keeps this one until the next one takes it, where the disk has such links."""
    try:
        os.link(path, other)
    except OSError:
        os.replace(path, other)


def load(out_dir):
    """The dict that save wrote, on the CPU: of the last checkpoint that is whole. UserError if there is none; no code
    in it is run."""
    names = checkpoint_names(out_dir)
    if not names:
        raise UserError(f"nothing to resume: {out_dir}/ckpt.pt is not there")
    problems = []
    for name in names:
        try:
            checkpoint = read(os.path.join(out_dir, name))
        except UserError as e:
            problems.append(str(e))
            continue
        for problem in problems:
            ranks.say(f"note: {problem}: going on from {name}, of step {checkpoint['step']}")
        return checkpoint
    raise UserError(problems[0])


def read(path):
    """A checkpoint's dict, held against what save writes. UserError."""
    checkpoint = hub.load_torch(path)
    other = f"{path} is not a checkpoint of train.py"
    if not isinstance(checkpoint, dict):
        raise UserError(other)
    jsonfile.check(path, checkpoint, FIELDS, "it is no checkpoint of train.py")
    kinds = {field.name: field.type for field in fields(GPTConfig)}
    kinds |= dict.fromkeys(("block_size", "vocab_size", "n_layer", "n_head", "n_embd"), (1, 2**31 - 1))
    kinds["eot"] = (0, 2**31 - 1)
    config = checkpoint["model_config"]
    jsonfile.check(f"{path}: model_config", config, kinds, "it is no checkpoint of train.py")
    if config.keys() != kinds.keys() or config["n_embd"] % config["n_head"]:
        raise UserError(f"{other}: its model_config is not model.py's")
    try:
        json.dumps(checkpoint["settings"])
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{other}: its settings are no settings") from None
    weights = checkpoint["model"]
    tensors = [t for t in weights.values() if isinstance(t, torch.Tensor) and t.layout == torch.strided]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors}.values())  # float32
    if not 0 < config["n_layer"] * 12 * config["n_embd"] ** 2 + config["vocab_size"] * config["n_embd"] <= held:
        raise UserError(f"{other}: its weights are not of the sizes in its model_config")
    with torch.device("meta"):  # its names and shapes alone
        model = GPT(GPTConfig(**config))
    if not same_tensors(weights, model.state_dict()):
        raise UserError(f"{other}: its weights are not those of a model of its model_config")
    hub.check_ln_state(path, checkpoint["ln_state"], model.ln_modes())
    for state in checkpoint["rng"]:
        if not isinstance(state, dict) or not same_tensors({"cpu": state.get("cpu")}, {"cpu": torch.get_rng_state()}):
            raise UserError(f"{other}: its rng is no state of torch's")
        try:
            torch.Generator().set_state(state["cpu"])
        except RuntimeError:
            raise UserError(f"{other}: its rng is no state of torch's") from None
    return checkpoint


def same_tensors(found, expected):
    """Whether a dict has tensors of just these names, shapes and dtypes."""
    if found.keys() != expected.keys() or not all(isinstance(t, torch.Tensor) for t in found.values()):
        return False
    return all((t.shape, t.dtype) == (expected[name].shape, expected[name].dtype) for name, t in found.items())


def load_model(checkpoint, dropout):
    """The GPT of what load returned, with its modes, constants and treatments."""
    model = GPT(GPTConfig(**checkpoint["model_config"] | dict(dropout=dropout)))
    model.load_state_dict(checkpoint["model"])
    model.load_ln_state(checkpoint["ln_state"])
    return model


def load_optimizers(optimizers, checkpoint):
    """Their momenta; the learning rate, decay and betas stay those of today's settings. UserError: momenta of other
    optimizers or parameters."""
    saved = [optimizer.get("state") for optimizer in checkpoint["optimizers"] if isinstance(optimizer, dict)]
    if len(saved) != len(optimizers):
        raise UserError(f"the checkpoint is of {len(saved)} optimizers, and train.py has {len(optimizers)}")
    for optimizer, state in zip(optimizers, saved):
        groups = optimizer.state_dict()["param_groups"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        whole = isinstance(state, dict) and state.keys() <= set(range(len(parameters)))
        for i in state if whole else ():
            tensors = [t for t in state[i].values()] if isinstance(state[i], dict) else [None]
            shapes = {tuple(t.shape) if isinstance(t, torch.Tensor) else None for t in tensors}
            whole &= shapes <= {(), tuple(parameters[i].shape)}
        if not whole:
            raise UserError("the checkpoint's momenta are not those of the model's parameters")
        optimizer.load_state_dict(dict(state=state, param_groups=groups))


def changed_settings(settings, checkpoint, but=("out_dir", "run")):
    """Which settings are not those of the checkpoint: "seed 1337 -> 7, ..."; empty if none."""
    old = checkpoint["settings"]
    changed = []
    for key in old:
        if key not in but and settings.get(key) != old[key]:
            changed.append(f"{key} {old[key]!r} -> {settings.get(key)!r}")
    return ", ".join(changed)


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


def refuse_another_run(settings, checkpoint, out_dir):
    """UserError unless a checkpoint that --init_from=auto has found is of the run that is asked for."""
    but = set(NO_MATTER) - {"init_from"}
    if settings["init_from"] != "scratch":
        but |= {"n_layer", "n_head", "n_embd", "bias"}  # which only `scratch` reads
    changed = changed_settings(settings, checkpoint, but)
    if changed:
        raise UserError(f"{out_dir} holds another run than is asked for ({changed}): begin anew with --force, "
                        "or go on with it all the same with --init_from=resume")


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
