"""
Checkpoints: ckpt.pt and, before it, ckpt-1.pt. Each holds all that a run needs to continue.
"""
import json
import os

import torch

from model import GPT, GPTConfig
from parts import hub, ranks
from parts.errors import UserError, reading
from parts.files import unfinished, whole_file

NAMES = ("ckpt.pt", "ckpt-1.pt")


def save(out_dir, step, model, optimizers, settings):
    """Write ckpt.pt before step `step`. All ranks call it, and rank 0 writes. The last checkpoint becomes ckpt-1.pt
    when the new one is whole. UserError if it can't be written."""
    rng = dict(cpu=torch.get_rng_state())
    if torch.cuda.is_initialized():
        rng["cuda"] = torch.cuda.get_rng_state()
    rng = ranks.gather(rng)
    if ranks.RANK > 0:
        return
    write(os.path.join(out_dir, "ckpt.pt"), dict(
        model=model.state_dict(),
        model_config=vars(model.config),
        ln_state=model.ln_state(),  # modes, constants and treatments, which the state dict leaves out
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        step=step,  # with the seed, it says which tokens come next
        settings=settings,
        rng=rng,  # random state of each rank, which dropout draws from
    ))


def write(path, checkpoint):
    def check(half):
        hub.check_zip(half)  # what is on disk is what was written
        if os.path.exists(path):
            os.replace(path, os.path.join(os.path.dirname(path), "ckpt-1.pt"))

    try:
        with whole_file(path, check) as f:
            torch.save(checkpoint, f)
    except (UserError, RuntimeError, ValueError) as e:
        # torch wraps a full disk's OSError in its own error: show the cause
        cause = e.__context__ if isinstance(e.__context__, OSError) else e
        raise UserError(f"can't save {path}: {str(cause).splitlines()[0]}; the checkpoint before it is kept") from None


def found(out_dir):
    """The paths of a folder's checkpoints, the newest first. A kill between the two changes of names in `write` leaves
    a whole one under its unfinished name; alone, it is what a kill in the first save left."""
    last, before = (os.path.join(out_dir, name) for name in NAMES)
    there = [path for path in (last, unfinished(last), before) if os.path.lexists(path)]
    return there if there != [unfinished(last)] else []


def load(out_dir, dropout=0.0):
    """The model, and the dict that `save` wrote, of the newest checkpoint that is whole, on the CPU. No code in it is
    run. UserError if there is none."""
    problems = []
    for path in found(out_dir):
        try:
            with reading(path, "it is not a whole checkpoint of train.py"):
                checkpoint = hub.load_torch(path)
                model = model_in(checkpoint, dropout)
        except UserError as e:
            problems.append(str(e))
            continue
        for problem in problems:
            ranks.say(f"note: {problem}: continuing from {path}, of step {checkpoint['step']}")
        return model, checkpoint
    raise UserError(problems[0] if problems else f"nothing to resume: {out_dir}/ckpt.pt is not there")


def model_in(checkpoint, dropout):
    """The GPT with its modes, constants and treatments. An exception of any kind if the dict is not from `save`."""
    config = GPTConfig(**checkpoint["model_config"] | dict(dropout=dropout))
    weights = checkpoint["model"]
    hub.check_size(config, sum(tensor.untyped_storage().nbytes() for tensor in set(weights.values())))
    model = GPT(config)
    model.load_state_dict(weights)
    model.load_ln_state(checkpoint["ln_state"])
    if not 0 <= checkpoint["step"] < 2**53 or not isinstance(checkpoint["optimizers"], list):
        raise ValueError("no step, or no optimizers")
    json.dumps([checkpoint["settings"]["init_from"], checkpoint["settings"]["ln_schedule"], checkpoint["settings"]])
    for state in checkpoint["rng"]:
        torch.Generator().set_state(state["cpu"])
    return model


def load_optimizers(optimizers, checkpoint, path):
    """Take over the momenta. Learning rate, weight decay and betas stay those of the settings. UserError if they are
    of other optimizers or parameters."""
    with reading(path, "its momenta are not those of train.py's optimizers"):
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))
            if any(t.shape not in ((), p.shape) for p, state in optimizer.state.items() for t in state.values()):
                raise ValueError("one has another shape than its parameter")


def set_rng_state(states):
    """Set this rank's own, where the checkpoint has it."""
    if ranks.RANK >= len(states):
        return
    state = states[ranks.RANK]
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_initialized() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
