"""
What a removal cost: the original, the control and the LN-free model on the same windows, side by side.

    python eval.py                                            # the last run under out/, on its own val set
    python eval.py --dataset=owt,pile,hellaswag,residual      # what is not there yet is fetched
    python eval.py --models=gpt2,ORG/NAME@REVISION,out/mine --dataset=pile --json=result.json
    python eval.py --verify                                   # is it really LN-free?

An LN-free model is folded first, so that what is measured has no LayerNorm in it. Windows don't
overlap, and are the same for all models. A standard error is over windows, taken as independent of
each other (a document can reach over several); that of a difference is over the windows'
differences. KL and Jensen-Shannon divergence are of the next token's distribution, in nats per
token.
"""
import glob
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass

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
from parts.files import check_file, run_settings, write_json
from parts.residual import residual_stats
from parts.run import model_directory, weights_sha256
from parts.sources import HUB
from parts.tokenizer import tokenizer_of
from parts.verify import problems

# -----------------------------------------------------------------------------
# what takes several takes them with commas between
dataset = ""  # owt, pile, stdlib, a folder under data/, a text file, hellaswag, residual; "": the last run's
models = ""  # model directories, out_dirs, hub repositories; "": the last run's original, control and LN-free model
reference = ""  # the model that faithfulness is to; "": the original
faithfulness = True  # KL, JS, same top token, correlation of losses, against the reference; entropy, calibration
verify = False  # only test that the models are LN-free ("": the last run's), and fail if one is not
tokens = 0  # >= 0: val tokens, spread evenly; 0: as published (owt 4.5 M, pile 10.2 M), else all of them
block_size = 0  # >= 0: tokens in a window; 0: the smallest context of the models
batch_size = 16  # >= 1: windows at a time
device = "auto"  # cuda, mps or cpu, the first that is there; or one by name
dtype = "float32"  # float32 or bfloat16: of autocast
json = ""  # a file to write everything into
hellaswag_url = hellaswag.URL  # where its file is fetched from
# -----------------------------------------------------------------------------

# tokens that are fetched and evaluated, as behind the published figures; of another of HUB's names 10 million
PUBLISHED = {"owt": 4_500_000, "pile": 10_200_000, "pile-filtered": 10_200_000}
NANOGPT_VAL_DOCUMENTS = 4007  # of OpenWebText
WIDTH = 80  # of a table, in columns
TITLES = dict(original="original", control="control", ln_free="LN-free", part="part removed")  # in the table


@dataclass
class Candidate:
    """A model in the table."""

    source: str
    role: str  # original, control, ln_free or part
    model: GPT
    sha256: str  # of its weights, before it is folded


# --- which models


def items(text):
    """The items of a comma-separated list, each once."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def last_run():
    """(sources, dataset) of the newest finished removal under out/: original, control and LN-free,
    those that are there."""
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
    sources = []
    if settings["init_from"] != "scratch":
        sources.append(settings["init_from"])
    if os.path.isdir(run + "_control/model"):
        sources.append(run + "_control")
    return [*sources, run], settings["dataset"]


def open_candidate(source):
    """The model of a source or a run's out_dir with its role; LN-free ones come folded. One with LN is a control
    where it is named by its run's out_dir, and an original otherwise."""
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    sha256 = weights_sha256(model) if json else ""
    if model.ln_free():
        return Candidate(source, "ln_free", model if model.config.folded else model.fold(), sha256)
    if "fake" in model.ln_modes().values():
        return Candidate(source, "part", model, sha256)
    return Candidate(source, "original" if directory == source else "control", model, sha256)


def check_comparable(candidates):
    first = candidates[0]
    for c in candidates:
        ours, theirs = c.model.config, first.model.config
        if ours.vocab_size != theirs.vocab_size:
            raise UserError(f"{first.source} has a vocabulary of {theirs.vocab_size} "
                            f"and {c.source} one of {ours.vocab_size}: compare models of one tokenizer")
        if block_size > ours.block_size:
            raise UserError(f"block_size {block_size} is beyond the {ours.block_size} positions of {c.source}")


# --- which data


def prepare(name, candidate):
    """The folder under data/ that holds `name`, made by prepare_owt.py if need be. UserError: there
    is no such data set, or none for models such as the candidate."""
    if os.path.isfile(name):
        folder = "eval_" + re.sub(r"[^\w.-]+", "_", name).strip("._")
        tokenizer = tokenizer_of(candidate.model, model_directory(candidate.source)).name
        args = [f"--dataset={folder}", f"--files={glob.escape(name)}", f"--tokenizer={tokenizer}"]
        args += ["--val_every=1", "--force"]
    elif name == os.path.basename(name) and os.path.exists(os.path.join("data", name)):
        return name
    elif name in HUB:
        vocab_size = candidate.model.config.vocab_size
        if vocab_size <= 50256:
            raise UserError(f"{name} is fetched as GPT-2's 50,257 tokens, "
                            f"but the models have a vocabulary of {vocab_size}")
        folder = name
        enough = PUBLISHED.get(name, 10_000_000) + 100_000
        args = [f"--dataset={name}", f"--tokens={enough}", "--val_every=1"]
    elif name == "stdlib":
        folder = name
        args = ["--dataset=stdlib"]
    else:
        there = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob("data/*/meta.json"))
        known = ", ".join(dict.fromkeys([*there, "stdlib", *HUB, "hellaswag", "residual"]))
        raise UserError(f"unknown data set {name!r}: there is {known}, or a text file's path; for text of your own run "
                        f"`python prepare_owt.py --dataset={name} --files=...`")
    if ranks.RANK == 0:
        print(f"preparing data/{folder}", flush=True)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_owt.py")
        done = subprocess.run([sys.executable, script, *args], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(1)  # it has said why
    return folder


def prepare_all(names, default, candidates):
    """{name: folder under data/} of the data sets among names, which are checked. The residual stream needs one of
    them, or else the default. UserError."""
    names = [name for name in names if name not in ("hellaswag", "residual")] or [default] * ("residual" in names)
    folders = {name: prepare(name, candidates[0]) for name in names}
    found = list(folders.values())
    twice = [folder for folder in found if found.count(folder) > 1]
    if twice:
        raise UserError(f"--dataset={dataset}: two of them would be data/{twice[0]}: rename one")
    for folder in found:
        check_data(folder, candidates)
    return folders


def check_data(folder, candidates):
    """What is wrong with a data set is said before hours are spent on others."""
    open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    check_tokens(folder, "val")
    eot = read_meta(folder)["eot"]
    for c in candidates:
        if c.model.config.eot != eot:
            ranks.say(f"note: end-of-text is {eot} in data/{folder}, but {c.model.config.eot} in {c.source}: "
                      "was it trained on such tokens?")


def val_set(folder):
    """What is in data/FOLDER/val.bin, as the table and the JSON name it."""
    meta = read_meta(folder)
    documents = meta["val"].get("documents")
    count = "documents" if documents is None else f"{documents:,} documents"
    return f"{count} of {meta.get('source', 'an unknown source')}"


def why_not_published(folder, n):
    """Why n val tokens of a folder are not those behind the published figures; "" if they are."""
    meta = read_meta(folder)
    if folder not in PUBLISHED:
        return ""
    if folder == "owt" and (meta.get("asked_tokens") or meta["val"].get("documents") != NANOGPT_VAL_DOCUMENTS):
        return ("they are over nanoGPT's val split, and data/owt has other documents: "
                "`prepare_owt.py --dataset=owt` without --tokens makes it")
    if abs(n / PUBLISHED[folder] - 1) > 0.02:
        return f"they are over {PUBLISHED[folder]:,} tokens, and this is over {n:,}"
    return ""


# --- cross-entropy and faithfulness


def cross_entropy_rows(folder, candidates, reference, autocast):
    """One JSON row for each model. reference: the source that faithfulness is to, or None."""
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    wanted = tokens or PUBLISHED.get(folder, len(data))
    n = min(wanted, len(data)) // block_size
    if n < 1:
        raise UserError(f"--tokens={tokens} is less than one window of {block_size}")
    starts = val_starts(data, n, block_size)
    own = starts[ranks.RANK :: ranks.WORLD]
    models = {c.source: c.model for c in candidates}
    found = measure(models, reference, data, own, block_size, batch_size, device, autocast)
    for arrays in found.values():
        for key in arrays:
            arrays[key] = ranks.gather_rows(arrays[key])

    originals = [c.source for c in candidates if c.role == "original"]
    originals.sort(key=lambda source: source == reference)  # another model to compare with is not where a run began
    original = originals[0] if originals else None
    control = next((c.source for c in candidates if c.role == "control"), None)
    rows = []
    for c in candidates:
        losses = found[c.source]["loss"]  # (windows, block_size)
        row = dict(dataset=folder, source=c.source, role=c.role, windows=len(starts), tokens=losses.size)
        row["val"] = val_set(folder)
        row["not_published"] = why_not_published(folder, losses.size)
        row["nonfinite"] = int((~np.isfinite(losses)).sum())
        row["loss"], row["loss_se"] = mean_and_error(losses.mean(1))
        row["median"], row["p99_9"], row["max"] = np.quantile(losses, [0.5, 0.999, 1])
        row["gap_to"] = row["gap"] = row["gap_se"] = None
        if c.role in ("ln_free", "part") and (control or original):
            row["gap_to"] = control or original
            row["gap"], row["gap_se"] = mean_and_error(losses.mean(1) - found[row["gap_to"]]["loss"].mean(1))
        row["to_original_source"] = row["to_original"] = row["to_original_se"] = None
        if c.role != "original" and original:
            row["to_original_source"] = original
            apart = losses.mean(1) - found[original]["loss"].mean(1)
            row["to_original"], row["to_original_se"] = mean_and_error(apart)
        if reference is not None and c.source != reference:
            for key in ("kl", "js", "agree"):
                row[key], row[key + "_se"] = mean_and_error(found[c.source][key])
            row["correlation"] = np.corrcoef(losses.ravel(), found[reference]["loss"].ravel())[0, 1]
            row["reference"] = reference
        if "entropy" in found[c.source]:
            row["entropy"], row["entropy_se"] = mean_and_error(found[c.source]["entropy"])
            confidence, hit = (found[c.source][key].ravel() for key in ("confidence", "hit"))
            row["calibration"] = calibration_error(confidence, hit)
        row["loss_by_position"] = losses.mean(0, dtype=np.float64).tolist()
        rows.append(row)
    return rows


def show_cross_entropy(candidates, rows):
    name, windows, word = rows[0]["dataset"], rows[0]["windows"], token_word(rows[0]["dataset"])
    gap_to = "gap to control" if any(c.role == "control" for c in candidates) else "gap to original"
    print_table(
        f"{name}: cross-entropy in nats per {word} ± standard error\n"
        f"over {windows:,} windows of {block_size} val tokens, of {rows[0]['val']}",
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
    gains = [-row["to_original"] for row in rows if row["role"] == "control" and row["to_original"]]
    gaps = [row["gap"] for row in rows if row["role"] == "ln_free" and row["gap"]]
    gained = max(gains, default=0)
    if gaps and gained > max(*gaps, 0):
        print(f"note: fine-tuning alone gains {gained:.4f}, more than the removal costs: the original is still "
              "learning, and the gap says little")
    if rows[0]["not_published"]:
        print(f"note: not to be compared with the published figures: {rows[0]['not_published']}")


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
    six = [round(i * (len(sites) - 1) / 5) for i in range(6)]  # a screenful
    shown = [sites[i] for i in dict.fromkeys(six)]
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
    """(examples, a function: text -> ids of the candidate's tokenizer)."""
    encode = tokenizer_of(candidate.model, model_directory(candidate.source)).encode
    path = os.path.join("data", "hellaswag", "hellaswag_val.jsonl")
    hellaswag.download(hellaswag_url, path)
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
    """Models side by side: lines of [label, a cell for each model]; a line without any cell is left
    out. At most 80 columns wide: further models stand below."""
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
    """At most 18 letters of it: its end, which tells more."""
    return source if len(source) <= 18 else "…" + source[-17:]


def finite(value):
    """For JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def check_json():
    """UserError if --json can't be written at the end."""
    if not json:
        return
    if not os.path.isdir(os.path.dirname(json) or "."):
        raise UserError(f"--json={json}: there is no directory {os.path.dirname(json)}")
    if os.path.isdir(json):
        raise UserError(f"--json={json} is a directory: name a file")
    check_file(json, ["command", "rows"])


def write_result(rows, data_hashes, candidates):
    """The file of --json: the rows, and with what they were measured."""
    write_json(json, dict(
        command=shlex.join(["python", *sys.argv]),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        dtype=dtype,
        device=device,
        data_sha256=data_hashes,
        weights_sha256={c.source: c.sha256 for c in candidates},
        runs={c.source: run_settings(c.source).get("run") for c in candidates},
        rows=finite(rows),
    ))


def verify_models(sources):
    """Print a verdict for each model; True if all are LN-free."""
    verdicts = []
    for source in sources:
        reasons = problems(GPT.from_pretrained(model_directory(source)).eval())
        verdicts.append(not reasons)
        if reasons:
            print("\n  ".join([f"{source}: NOT LN-free", *reasons]))
        else:
            print(f"{source}: LN-free: all that reads the residual stream is affine in it")
    return all(verdicts)


def say_next(candidates, names):
    """What to type after the tables, if there is a run to go on with."""
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
    configure(globals(), sys.argv[1:], __doc__)
    if not verify:
        ranks.use_all_gpus(device)
    torch.set_float32_matmul_precision("highest")  # no TF32 in a figure, whatever the environment asks for
    device = pick_device(device)
    autocast = autocast_to(pick_dtype(dtype, device), device)
    check_json()
    if verify:
        sources = items(models) or last_run()[0][-1:]
        sys.exit(0 if ranks.RANK > 0 or verify_models(sources) else 1)

    ranks.join("cpu")  # gloo: a few results at the end, whatever the device
    with ranks.rank_0_first():  # it fetches and prepares
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
        if json and ranks.RANK == 0:  # before it is shown, which can fail
            write_result(rows, data_hashes, candidates)
        if ranks.RANK == 0:
            show(candidates, found)

    say_next(candidates, names)
    ranks.leave()


if __name__ == "__main__":
    main()
