"""
What a removal costs: the original, the control and the LN-free model side by side on the same windows.

    python eval.py                                            # the last run under out/, on its own val set
    python eval.py --dataset=owt,pile,hellaswag,residual      # fetches what is missing
    python eval.py --models=gpt2,ORG/NAME@REVISION,out/mine --dataset=pile --json=result.json
    python eval.py --verify                                   # is it really LN-free?

Pass a run's out_dir to mark a model as the control; any other model with LN counts as the original. An LN-free model
is folded first, so that no LayerNorm is left in what is measured.

The windows don't overlap. A standard error is over windows, as if they were independent (a document can span
several); the standard error of a difference is paired, over the windows' differences. KL and Jensen-Shannon
divergence compare next-token distributions, in nats per token.
"""
import glob
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from json import dumps

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure
from model import GPT
from parts import hellaswag, ranks
from parts.compare import calibration_error, cast_linear_maps, mean_and_error, measure
from parts.data import check_tokens, open_tokens, read_meta, read_windows, token_word, val_starts
from parts.device import autocast_to, pick_device, pick_dtype
from parts.files import check_file, parse_json, run_settings, write_json
from parts.residual import residual_stats
from parts.run import model_directory, weights_sha256
from parts.sources import HUB
from parts.tokenizer import tokenizer_of
from parts.verify import problems

# -----------------------------------------------------------------------------
# separate several models or data sets by commas
dataset = ""  # owt, pile, stdlib, a folder under data/, a text file, hellaswag, residual; "": the last run's
models = ""  # model directories, out_dirs, hub repositories; "": the last run's original, control and LN-free model
reference = ""  # compare distributions with this model; "": the original
faithfulness = True  # KL, JS, same top token and loss correlation against the reference; entropy, calibration
verify = False  # only test whether the models ("": the last run's) are LN-free; exit code 1 if one is not
tokens = 0  # val tokens, spread evenly; 0: as published (owt 4.5 M, pile 10.2 M), otherwise all
block_size = 0  # tokens in a window; 0: the shortest context of the models
batch_size = 16  # windows in a forward pass
device = "auto"  # cuda, mps or cpu, the first that is there; or one by name
dtype = "float32"  # float32 or bfloat16, for autocast
json = ""  # write the results to this file
# -----------------------------------------------------------------------------

# tokens to fetch and evaluate, as in the published figures; 10 million for HUB's other names
PUBLISHED = {"owt": 4_500_000, "pile": 10_200_000, "pile-filtered": 10_200_000}
NANOGPT_VAL_DOCUMENTS = 4007  # of OpenWebText
WIDTH = 80  # of a table, in columns
TITLES = dict(original="original", control="control", ln_free="LN-free", part="part removed")  # in a table


@dataclass
class Candidate:
    """A model in the table."""

    source: str
    directory: str
    role: str  # original, control, ln_free or part
    model: GPT
    sha256: str  # of its weights before folding; "" without --json


# --- which models


def items(text):
    """The items of a comma-separated list, each once."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def last_run():
    """(sources, dataset) of the newest finished removal under out/: original, control and LN-free model."""
    finished = {}
    for path in glob.glob("out/*/model/config.json"):
        run = os.path.dirname(os.path.dirname(path))
        if run_settings(run).get("ln_schedule"):
            finished[run] = os.path.getmtime(path)
    if not finished:
        raise UserError("no finished removal under out/: run `python train.py config/remove_ln_tiny.py` first, "
                        "or name --models")
    run = max(finished, key=finished.get)
    settings = run_settings(run)
    original = [settings["init_from"]] if settings["init_from"] != "scratch" else []
    control = [run + "_control"] if os.path.isdir(run + "_control/model") else []
    return [*original, *control, run], settings["dataset"]


def open_candidate(source):
    """The model of a source or a run's out_dir, with its role. An LN-free model is folded. UserError."""
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    sha256 = weights_sha256(model) if json else ""
    if model.ln_free():
        role = "ln_free"
        model = model if model.config.folded else model.fold()
    elif model.any_removed():
        role = "part"
    else:
        role = "original" if directory == source else "control"
    return Candidate(source, directory, role, model, sha256)


def check_comparable(candidates):
    first = candidates[0]
    for c in candidates:
        ours, theirs = c.model.config, first.model.config
        if ours.vocab_size != theirs.vocab_size:
            raise UserError(f"{first.source} has a vocabulary of {theirs.vocab_size} "
                            f"and {c.source} one of {ours.vocab_size}: compare models with the same tokenizer")
        if block_size > ours.block_size:
            raise UserError(f"block_size {block_size} is beyond the {ours.block_size} positions of {c.source}")


# --- which data


def prepare(name, candidate):
    """The folder under data/ for the data set `name`; prepare_owt.py makes it if it is missing. UserError: there is no
    such data set, or the candidate's vocabulary does not fit."""
    folder = name
    if os.path.isfile(name):
        folder = "eval_" + re.sub(r"[^\w.-]+", "_", name).strip("._")
        tokenizer = tokenizer_of(candidate.model, candidate.directory).name
        args = [f"--files={glob.escape(name)}", f"--tokenizer={tokenizer}", "--val_every=1", "--force"]
    elif name == os.path.basename(name) and os.path.exists(os.path.join("data", name)):
        return name
    elif name in HUB:
        vocab_size = candidate.model.config.vocab_size
        if vocab_size <= 50256:
            raise UserError(f"{name} is fetched as GPT-2's 50,257 tokens, "
                            f"but the models have a vocabulary of {vocab_size}")
        args = [f"--tokens={PUBLISHED.get(name, 10_000_000) + 100_000}", "--val_every=1"]
    elif name == "stdlib":
        args = []
    else:
        there = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob("data/*/meta.json"))
        known = ", ".join(dict.fromkeys([*there, "stdlib", *HUB, "hellaswag", "residual"]))
        raise UserError(f"unknown data set {name!r}: choose one of {known}, or a text file; to prepare your own text, "
                        f"run `python prepare_owt.py --dataset={name} --files=...`")
    if ranks.RANK == 0:
        print(f"preparing data/{folder}", flush=True)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_owt.py")
        command = [sys.executable, script, f"--dataset={folder}", *args]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(1)  # it has printed why
    return folder


def prepare_all(names, default, candidates):
    """{name: folder under data/} of the data sets among names, checked before any is measured. The residual stream
    takes the first of them, or else the default. UserError."""
    names = [name for name in names if name not in ("hellaswag", "residual")] or [default] * ("residual" in names)
    folders = {name: prepare(name, candidates[0]) for name in names}
    found = list(folders.values())
    for folder in found:
        if found.count(folder) > 1:
            raise UserError(f"--dataset={dataset}: two of them would be data/{folder}: rename one")
        open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
        check_tokens(folder, "val")
        eot = read_meta(folder)["eot"]
        for c in candidates:
            if c.model.config.eot != eot:
                ranks.say(f"note: end-of-text is {eot} in data/{folder}, but {c.model.config.eot} in {c.source}: "
                          "was it trained on such tokens?")
    return folders


def val_set(folder):
    """What data/FOLDER/val.bin holds, for the table and the JSON."""
    meta = read_meta(folder)
    documents = meta["val"].get("documents")
    count = "documents" if documents is None else f"{documents:,} documents"
    return f"{count} of {meta.get('source', 'an unknown source')}"


def why_not_published(folder, n):
    """Why n val tokens of a folder are not those of the published figures; "" if they are, or if there are none."""
    meta = read_meta(folder)
    if folder == "owt" and (meta.get("asked_tokens") or meta["val"].get("documents") != NANOGPT_VAL_DOCUMENTS):
        return ("they use nanoGPT's val split, and data/owt has other documents: "
                "`python prepare_owt.py --dataset=owt` without --tokens makes it")
    if folder in PUBLISHED and abs(n / PUBLISHED[folder] - 1) > 0.02:
        return f"they use {PUBLISHED[folder]:,} tokens, and this table {n:,}"
    return ""


# --- cross-entropy and faithfulness


def cross_entropy_rows(folder, candidates, reference, autocast):
    """One JSON row for each model. reference: the source that distributions are compared with, or None."""
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    n = min(tokens or PUBLISHED.get(folder, len(data)), len(data)) // block_size
    if n < 1:
        raise UserError(f"--tokens={tokens} is less than one window of {block_size}")
    starts = val_starts(data, n, block_size)
    by_source = {c.source: c.model for c in candidates}
    found = measure(by_source, reference, data, starts, block_size, batch_size, device, autocast)
    window_losses = {source: arrays["loss"].mean(1) for source, arrays in found.items()}  # (windows,)

    # an original that is only there to compare distributions with is the last choice
    originals = sorted((c.source for c in candidates if c.role == "original"), key=lambda source: source == reference)
    original = next(iter(originals), None)
    control = next((c.source for c in candidates if c.role == "control"), None)

    def difference(source, other):
        if other is None:
            return None, None
        return mean_and_error(window_losses[source] - window_losses[other])

    rows = []
    for c in candidates:
        arrays = found[c.source]
        losses = arrays["loss"]  # (windows, block_size)
        row = dict(dataset=folder, source=c.source, role=c.role, windows=len(starts), tokens=losses.size)
        row["val"] = val_set(folder)
        row["not_published"] = why_not_published(folder, losses.size)
        row["nonfinite"] = int((~np.isfinite(losses)).sum())
        row["loss"], row["loss_se"] = mean_and_error(window_losses[c.source])
        row["median"], row["p99_9"], row["max"] = np.quantile(losses, [0.5, 0.999, 1])
        row["gap_to"] = (control or original) if c.role in ("ln_free", "part") else None
        row["gap"], row["gap_se"] = difference(c.source, row["gap_to"])
        row["to_original_source"] = original if c.role != "original" else None
        row["to_original"], row["to_original_se"] = difference(c.source, row["to_original_source"])
        if reference is not None:
            row["entropy"], row["entropy_se"] = mean_and_error(arrays["entropy"])
            row["calibration"] = calibration_error(arrays["confidence"].ravel(), arrays["hit"].ravel())
        if reference not in (None, c.source):
            row["reference"] = reference
            for key in ("kl", "js", "agree"):
                row[key], row[key + "_se"] = mean_and_error(arrays[key])
            row["correlation"] = np.corrcoef(losses.ravel(), found[reference]["loss"].ravel())[0, 1]
        row["loss_by_position"] = losses.mean(0, dtype=np.float64).tolist()
        rows.append(row)
    return rows


def show_cross_entropy(candidates, rows):
    word = token_word(rows[0]["dataset"])
    gap_to = "gap to control" if any(c.role == "control" for c in candidates) else "gap to original"
    print_table(
        f"{rows[0]['dataset']}: cross-entropy in nats per {word} ± standard error\n"
        f"over {rows[0]['windows']:,} windows of {block_size} val tokens, from {rows[0]['val']}",
        candidates,
        [
            [f"nats per {word}", *with_errors(rows, "loss", ".4f")],
            [gap_to, *with_errors(rows, "gap", "+.4f")],
            ["minus original", *with_errors(rows, "to_original", "+.4f")],
            [f"median {word}", *values(rows, "median", ".4f")],
            ["99.9th percentile", *values(rows, "p99_9", ".4f")],
            ["largest", *values(rows, "max", ".4f")],
            ["not finite", *(f"{row['nonfinite']:,} tokens" if row["nonfinite"] else "" for row in rows)],
            ["entropy", *with_errors(rows, "entropy", ".4f")],
            ["calibration error", *values(rows, "calibration", ".4f")],
            ["KL from reference", *with_errors(rows, "kl", ".4f")],
            ["Jensen-Shannon", *with_errors(rows, "js", ".4f")],
            ["same top token", *values(rows, "agree", ".2%")],
            ["loss correlation", *values(rows, "correlation", ".4f")],
        ],
    )
    gained = max([0, *(-row["to_original"] for row in rows if row["role"] == "control" and row["to_original"])])
    gaps = [row["gap"] for row in rows if row["role"] == "ln_free" and row["gap"]]
    if gaps and gained > max(0, *gaps):
        print(f"note: fine-tuning alone gains {gained:.4f}, more than the removal costs: the original is still "
              "learning, and the gap says little")
    if rows[0]["not_published"]:
        print(f"note: don't compare this with the published figures: {rows[0]['not_published']}")


# --- the residual stream


def residual_rows(folder, candidates, autocast):
    """One JSON row for each model, on rank 0."""
    if ranks.RANK > 0:
        return []
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    starts = val_starts(data, max(1, min(tokens or 100_000, len(data)) // block_size), block_size)
    rows = []
    for c in candidates:
        firsts = tqdm(range(0, len(starts), batch_size), c.source, unit="batch", leave=False, disable=None)
        batches = (read_windows(data, starts[i : i + batch_size], block_size, device)[0] for i in firsts)
        with autocast:
            stats = residual_stats(c.model, batches)
        row = dict(dataset="residual", source=c.source, role=c.role, data=folder, windows=len(starts))
        rows.append(row | stats)
    return rows


def show_residual(candidates, rows):
    sites = list(max((row["sites"] for row in rows), key=len))  # of the deepest model
    shown = list(dict.fromkeys(sites[round(i * (len(sites) - 1) / 5)] for i in range(6)))  # a screenful
    lines = []
    for site in shown:
        for kind in ("position_0", "eot", "others"):
            stds = [row["sites"].get(site, {}).get(kind) for row in rows]
            cells = [f"{std['mean']:.3f} ± {std['spread']:.3f}" if std else "" for std in stds]
            lines.append([f"{site}, {kind.replace('_', ' ')}", *cells])
    lines.append(["attention sink rate", *values(rows, "sink_rate", ".1%")])
    print_table(
        f"residual: std before {len(shown)} of {len(sites)} sites (--json has all), mean ± spread\n"
        f"over tokens of {rows[0]['windows']:,} windows of {block_size} of data/{rows[0]['data']}",
        candidates,
        lines,
    )


# --- HellaSwag


def open_hellaswag(candidate):
    """(examples, the candidate's tokenizer as a function: text -> ids)."""
    encode = tokenizer_of(candidate.model, candidate.directory).encode
    path = os.path.join("data", "hellaswag", "hellaswag_val.jsonl")
    hellaswag.download(path)
    return hellaswag.read_examples(path), lambda text: encode(text).tolist()


def hellaswag_rows(examples, encode, candidates, autocast):
    """One JSON row for each model."""
    labels = np.array([example.label for example in examples])
    rows = []
    for c in candidates:
        bar_name = c.source if ranks.RANK == 0 else ""
        own = examples[ranks.RANK :: ranks.WORLD]
        sums, counts = hellaswag.score(c.model, own, encode, device, autocast, bar_name)
        accuracies = hellaswag.accuracies(ranks.gather_rows(sums), ranks.gather_rows(counts), labels)
        row = dict(dataset="hellaswag", source=c.source, role=c.role, examples=len(examples))
        rows.append(row | accuracies)
    return rows


def show_hellaswag(candidates, rows):
    print_table(
        f"hellaswag: share of right endings ± binomial standard error, {rows[0]['examples']:,} examples",
        candidates,
        [
            ["length-normalised", *with_errors(rows, "acc_norm", ".2%")],
            ["accuracy", *with_errors(rows, "acc", ".2%")],
        ],
    )


# --- tables and JSON


def values(rows, key, form):
    return [f"{row[key]:{form}}" if row.get(key) is not None else "" for row in rows]


def with_errors(rows, key, form):
    errors = values(rows, key + "_se", form.lstrip("+"))
    return [f"{value} ± {error}" if value else "" for value, error in zip(values(rows, key, form), errors)]


def print_table(title, candidates, lines):
    """Print lines of [label, a cell for each model], without the empty ones. Models that don't fit into 80 columns go
    below."""
    lines = [line for line in lines if any(line[1:])]
    sources = [shortened(c.source) for c in candidates]
    cells = [["", *(TITLES[c.role] for c in candidates)], ["", *sources], *lines]
    labels, *columns = zip(*cells)
    label_width = max(map(len, labels))
    print()
    for line in title.splitlines():
        print(textwrap.fill(line, WIDTH))
    while columns:
        beside, width = [], label_width
        while columns and (not beside or width + 2 + max(map(len, columns[0])) <= WIDTH):
            beside.append(columns.pop(0))
            width += 2 + max(map(len, beside[-1]))
        print()
        for label, *row in zip(labels, *beside):
            row = [cell.rjust(max(map(len, column))) for cell, column in zip(row, beside)]
            print("  ".join([label.ljust(label_width), *row]).rstrip())


def shortened(source):
    """The last 18 letters."""
    return source if len(source) <= 18 else "…" + source[-17:]


def write_result(rows, data_hashes, candidates):
    """Write the file of --json: the rows, and what they were measured with. NaN becomes null."""
    result = dict(
        command=shlex.join(["python", *sys.argv]),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        dtype=dtype,
        device=device,
        data_sha256=data_hashes,
        weights_sha256={c.source: c.sha256 for c in candidates},
        runs={c.source: run_settings(c.source).get("run") for c in candidates},
        rows=rows,
    )
    write_json(json, parse_json(dumps(result, default=float)))  # default: NumPy's numbers


def verify_models(sources):
    """Print a verdict for each model; True if all are LN-free."""
    all_free = True
    for source in sources:
        reasons = problems(GPT.from_pretrained(model_directory(source)).eval())
        verdict = "NOT LN-free" if reasons else "LN-free: everything that reads the residual stream is affine in it"
        print("\n  ".join([f"{source}: {verdict}", *reasons]))
        all_free = all_free and not reasons
    return all_free


def say_next(candidates, names):
    """Print the next commands, if there are any."""
    commands = []
    if json and "residual" in names:
        commands.append(f"python -m tools.plot {json}")
    runs = [c.source for c in candidates if c.role == "ln_free" and run_settings(c.source)]
    if runs:
        commands += [f"python -m tools.plot {runs[-1]}", f"python -m tools.export {runs[-1]} --to=hf"]
    if commands:
        ranks.say("next: " + "; ".join(commands))


def main():
    global block_size, device
    dtypes = ("float32", "bfloat16")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(batch_size=1), choices=dict(dtype=dtypes))
    if not verify:
        ranks.use_all_gpus(device)
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment says
    device = pick_device(device)
    autocast = autocast_to(pick_dtype(dtype, device), device)
    if json:  # now, and not after hours
        if not os.path.isdir(os.path.dirname(json) or "."):
            raise UserError(f"--json={json}: there is no directory {os.path.dirname(json)}")
        check_file(json, ["command", "rows"])
    if verify:
        sources = items(models) or last_run()[0][-1:]
        sys.exit(0 if ranks.RANK > 0 or verify_models(sources) else 1)

    ranks.join("cpu")  # gloo, for a few results at the end
    with ranks.rank_0_first():  # to fetch and prepare
        sources, run_dataset = (items(models), "") if items(models) else last_run()
        if reference and reference not in sources:
            sources.insert(0, reference)
        candidates = [open_candidate(source) for source in sources]
        check_comparable(candidates)
        block_size = block_size or min(c.model.config.block_size for c in candidates)
        default = run_dataset or ("owt" if candidates[0].model.config.vocab_size > 50256 else "stdlib")
        names = items(dataset) or [default]
        folders = prepare_all(names, default, candidates)
        if "hellaswag" in names:
            examples, encode = open_hellaswag(candidates[0])

    for c in candidates:
        c.model.to(device)
        if dtype == "bfloat16":
            cast_linear_maps(c.model)
    original = next((c.source for c in candidates if c.role == "original"), candidates[0].source)
    faithful_to = (reference or original) if faithfulness else None

    rows, data_hashes = [], {}
    for name in names:
        if name == "hellaswag":
            found = hellaswag_rows(examples, encode, candidates, autocast)
            show = show_hellaswag
        elif name == "residual":
            found = residual_rows(next(iter(folders.values())), candidates, autocast)
            show = show_residual
        else:
            found = cross_entropy_rows(folders[name], candidates, faithful_to, autocast)
            show = show_cross_entropy
            data_hashes[folders[name]] = read_meta(folders[name])["val"].get("sha256")
        rows += found
        if json and ranks.RANK == 0:  # before printing, which can fail
            write_result(rows, data_hashes, candidates)
        if ranks.RANK == 0:
            show(candidates, found)

    say_next(candidates, names)
    ranks.leave()


if __name__ == "__main__":
    main()
