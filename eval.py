"""
What a removal cost: the cross-entropy of the original, the control and the LN-free model on the same windows, side by side.

    python eval.py                                          # the last run under out/, on its own val set
    python eval.py --dataset=mytext                         # the same models on data/mytext
    python eval.py --models=assets/tiny,out/remove_ln_tiny  # any models: model directories, or out_dirs of runs

An LN-free model is folded first, so that what is measured has no LayerNorm in it. Windows don't overlap, and are the same for all
models; a standard error is over windows, and that of a gap is over the windows' differences.
"""
import glob
import os
import shlex
import sys
from contextlib import nullcontext
from json import dump, load

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure, one_line_errors
from data import open_tokens, read_windows, val_starts
from model import GPT

# -----------------------------------------------------------------------------
dataset = ""  # a folder under data/; by default the last run's
models = ""  # comma-separated model directories or out_dirs; by default the original, the control and the LN-free model of the last run
tokens = 0  # how many val tokens, spread evenly; 0: all of them
block_size = 0  # tokens in a window; 0: the smallest context of the models
batch_size = 16  # windows at a time
device = "auto"  # cuda where there is one, else cpu
dtype = "float32"  # or bfloat16: autocast
json = ""  # a file to write everything into
# -----------------------------------------------------------------------------


def read_settings(run):
    """The settings of a run's out_dir; {} where there are none."""
    try:
        with open(os.path.join(run, "settings.json")) as f:
            return load(f)
    except FileNotFoundError:
        return {}


def last_run():
    """(sources, dataset) of the newest finished removal under out/: original, control and LN-free, those that are there."""
    finished = {os.path.dirname(os.path.dirname(path)): os.path.getmtime(path) for path in glob.glob("out/*/model/config.json")}
    finished = {run: when for run, when in finished.items() if read_settings(run).get("ln_schedule")}
    if not finished:
        raise FileNotFoundError("no finished removal under out/: run `python train.py config/remove_ln_tiny.py` first, or name --models")
    run = max(finished, key=finished.get)
    settings = read_settings(run)
    sources = [settings["init_from"], run + "_control", run]
    return [s for s in sources if os.path.exists(s)], settings["dataset"]


def open_model(source):
    """(role, model) of a model directory or a run's out_dir; the LN-free ones come folded."""
    run = os.path.isdir(os.path.join(source, "model"))
    model = GPT.from_pretrained(os.path.join(source, "model") if run else source).eval()
    if model.config.folded:
        return "ln_free", model
    if model.ln_free():
        return "ln_free", model.fold()
    if "fake" in model.ln_modes().values():
        return "part", model
    return "control" if run else "original", model


@torch.inference_mode()
def token_losses(model, data, starts, name):
    """Loss in nats of every token of the windows, (windows, block_size) float32."""
    context = torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    losses = []
    for i in tqdm(range(0, len(starts), batch_size), desc=name, unit="batch", leave=False, disable=None):
        x, y = read_windows(data, starts[i : i + batch_size], block_size, device)
        with context:
            logits, _ = model(x)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape).cpu().numpy())
    return np.concatenate(losses)


def mean_and_error(windows):
    """Mean over the windows' means (windows,), and its standard error."""
    return windows.mean(), windows.std(ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else float("nan")


def print_table(rows):
    names = dict(original="original", control="control", ln_free="LN-free", part="part removed")
    cells = [["", *(names[r["role"]] for r in rows)], ["", *(r["source"] for r in rows)],
             [rows[0]["dataset"], *(f"{r['loss']:.4f} ± {r['loss_se']:.4f}" for r in rows)],
             ["gap", *("" if r["gap"] is None else f"{r['gap']:+.4f} ± {r['gap_se']:.4f}" for r in rows)]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


def main():
    global block_size, dataset, device
    configure(globals(), sys.argv[1:], __doc__)
    if dtype not in ("float32", "bfloat16"):
        sys.exit(f"error: dtype is {dtype!r}, but it must be float32 or bfloat16")
    if batch_size < 1 or tokens < 0 or block_size < 0:
        sys.exit("error: batch_size must be 1 or more, tokens and block_size 0 or more")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with one_line_errors():
        sources, last_dataset = (models.split(","), "stdlib") if models else last_run()
        dataset = dataset or last_dataset
        opened = [(source, *open_model(source)) for source in sources]
        for source, _, model in opened:
            if block_size > model.config.block_size:
                raise ValueError(f"block_size {block_size} is beyond the {model.config.block_size} positions of {source}")
        block_size = block_size or min(model.config.block_size for _, _, model in opened)
        data = open_tokens(dataset, "val", block_size, min(model.config.vocab_size for _, _, model in opened))
        n = (tokens or len(data)) // block_size
        if n < 1:
            raise ValueError(f"--tokens={tokens} is less than one window of {block_size}")
        starts = val_starts(data, n, block_size)

    losses = {}  # by source: the mean loss of each window
    for source, _, model in opened:
        losses[source] = token_losses(model.to(device), data, starts, source).mean(1)
    base = next((s for role in ("control", "original") for s, r, _ in opened if r == role), None)
    rows = []
    for source, role, _ in opened:
        loss, loss_se = mean_and_error(losses[source])
        gap, gap_se = mean_and_error(losses[source] - losses[base]) if role in ("ln_free", "part") and base else (None, None)
        rows.append(dict(dataset=dataset, source=source, role=role, loss=loss, loss_se=loss_se, gap=gap, gap_se=gap_se, gap_to=base if gap is not None else None,
                         windows=len(starts), tokens=len(starts) * block_size))
    print(f"cross-entropy in nats per token ± standard error over {len(starts):,} windows of {block_size} val tokens" + (f"; gap to {base}" if base else ""))
    print_table(rows)
    if json:
        with one_line_errors(), open(json, "w") as f:
            dump(dict(command=shlex.join(["python", *sys.argv]), rows=rows), f, indent=2, default=float)


if __name__ == "__main__":
    main()
