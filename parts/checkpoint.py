"""
Checkpoints: ckpt.pt, and before it ckpt-1.pt and so on; all that a run needs to go on.
"""
import json
import os
from dataclasses import fields
from zipfile import BadZipFile

import torch

from model import GPT, GPTConfig
from parts import hub, jsonfile, ranks
from parts.errors import UserError
from parts.files import whole_file

# of a checkpoint; jsonfile.check's kinds
FIELDS = dict(model=dict, model_config=dict, ln_state=dict, optimizers=list, step=(0, 2**53), rng=list,
              settings={"init_from": str, "ln_schedule": list, "run?": str})


def checkpoint_names(out_dir):
    """The names of a folder's checkpoints, the newest first: ckpt.pt, ckpt-1.pt, ... A number after a gap is a user's
    own, but for the gap that a kill in `write` can leave."""
    names = ["ckpt.pt", *(f"ckpt-{n}.pt" for n in range(1, 100))]
    there = [os.path.lexists(os.path.join(out_dir, name)) for name in names]
    return [name for n, name in enumerate(names) if there[n] and (n < 3 or all(there[2:n]))]


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
