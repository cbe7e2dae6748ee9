"""
Evaluate the original, the control and the LN-free model side by side, on the same windows.

    python eval.py                                            # the last run in out/, on its own val set
    python eval.py out/mine                                   # this run: its original, its control and itself
    python eval.py --dataset=owt,pile,hellaswag,residual      # fetches what is not here yet
    python eval.py --dataset=circuits                         # do they resemble the original's?
    python eval.py --models=gpt2,ORG/NAME@REVISION,out/mine --dataset=pile --json=result.json
    python eval.py --verify                                   # is it really LN-free?

Pass a run's out_dir to mark a model as the control; any other model with LN counts as the original. An LN-free model
is folded first, so that no LayerNorm is left in what is measured. Each LN-free run keeps the last table of losses as
eval.json in its out_dir, for the card of an export. Windows don't overlap. Standard errors treat windows as
independent, though a document can span several; the error of a difference is that of the windows' differences. KL and
Jensen-Shannon divergence compare next-token distributions, in nats per token.
"""
import glob
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from json import dumps

from parts.errors import UserError, begin_script, command, say_next

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, take_source
from model import GPT
from parts import hellaswag, ranks
from parts.compare import calibration_error, cast_linear_maps, mean_and_error, measure, with_error
from parts.data import check_tokens, open_tokens, read_meta, read_windows, token_word, val_starts
from parts.device import autocast_to, pick_device
from parts.files import check_file, parse_json, run_settings, write_json
from parts.residual import residual_stats
from parts.resemblance import resemblance
from parts.run import model_directory, weights_sha256
from parts.sources import HUB
from parts.tokenizer import check_data, fingerprint_of, tokenizer_of
from parts.verify import problems

# -----------------------------------------------------------------------------
# settings: a default, and what it means; lists are separated by commas
dataset = ""  # owt, pile, stdlib, in data/, a text file, hellaswag, residual, circuits; "": the last run's, or owt
models = ""  # model directories, out_dirs, hub repositories; "": the last run's original, control and LN-free model
reference = ""  # the model that the others are compared with; "": the original
faithfulness = True  # KL, JS, top-token agreement and correlation of losses with the reference; entropy, calibration
any_tokenizer = False  # compare models and data of different tokenizers
verify = False  # only test that the models (by default the last run's) are LN-free; exit code 1 if one is not
tokens = 0  # val tokens, spread evenly; 0: as published (owt 4.5 M, pile 10.2 M), residual 100,000, circuits 10,000
block_size = 0  # tokens in a window; 0: the shortest that a model's run trained on, else the shortest context window
batch_size = 16  # windows in a forward pass
device = "auto"  # the first of cuda, mps and cpu that is there; or a device's name
dtype = "float32"  # autocast dtype: float32 or bfloat16
json = ""  # a file for all results; "": losses, in eval.json of each LN-free run
# -----------------------------------------------------------------------------

PUBLISHED = {"owt": 4_500_000, "pile": 10_200_000, "pile-filtered": 10_200_000}  # tokens behind the published figures
NANOGPT_VAL_DOCUMENTS = 4007  # documents in nanoGPT's val split of OpenWebText
WIDTH = 80  # columns of a printed table
# column heading for each role
TITLES = dict(original="original", control="control", ln_free="LN-free", part="partly removed")
LINES = (  # a table's rows: key in the JSON, label, format
    ("loss", "nats per {word}", ".4f"),
    ("gap", "gap to {control}", "+.4f"),
    ("to_original", "minus original", "+.4f"),
    ("median", "median {word}", ".4f"),
    ("p99_9", "99.9th percentile", ".4f"),
    ("max", "largest", ".4f"),
    ("nonfinite", "tokens not finite", ","),
    ("entropy", "entropy", ".4f"),
    ("calibration", "calibration error", ".4f"),
    ("kl", "KL from reference", ".4f"),
    ("js", "Jensen-Shannon", ".4f"),
    ("agree", "same top token", ".2%"),
    ("correlation", "loss correlation", ".4f"),
    ("acc_norm", "length-normalised", ".2%"),
    ("acc", "accuracy", ".2%"),
    ("sink_rate", "attention sink > 0.3", ".1%"),
    ("sink_heads", "heads with mean > 0.3", ".1%"),
    ("cosine", "stream, cosine", ".4f"),
    ("cosine_gap", "  minus control", "+.4f"),
    ("cka", "stream, linear CKA", ".4f"),
    ("attention_js", "attention, JS in nats", ".4f"),
    ("attention_js_gap", "  minus control", "+.4f"),
    ("contributions", "contributions, rank corr.", ".4f"),
    ("contributions_gap", "  minus control", "+.4f"),
    ("effects", "ablations, rank corr.", ".4f"),
    ("effects_gap", "  minus control", "+.4f"),
    ("prefix_matching", "prefix matching, corr.", ".4f"),
    ("copying", "copying, corr.", ".4f"),
)


# --- which models


@dataclass
class Candidate:
    """A model in the table."""

    source: str
    directory: str  # with the model's files
    role: str  # original, control, ln_free, or part: some sites are removed
    model: GPT
    sha256: str  # hash of the weights before folding


def items(text):
    """The items of a comma-separated list, without duplicates."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


def last_removal():
    """The out_dir of the newest finished removal in out/."""
    for path in sorted(glob.glob("out/*/model/config.json"), key=os.path.getmtime, reverse=True):
        run = os.path.dirname(os.path.dirname(path))
        if run_settings(run).get("ln_schedule"):
            return run
    raise UserError("no finished removal in out/: run `python train.py config/remove_ln_tiny.py` or name --models")


def open_candidate(source):
    """The Candidate of a model directory, hub repository or out_dir; folded if it is LN-free."""
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    sha256 = weights_sha256(model)
    role = "original" if directory == source else "control"
    if model.ln_free():
        role, model = "ln_free", model if model.config.folded else model.fold()
    elif model.any_removed():
        role = "part"
    return Candidate(source, directory, role, model, sha256)


def window_of(candidates):
    """--block_size or, by default, the shortest window that the models' runs trained on: positions beyond it were never
    trained. A model that is not a run's counts with all its positions."""
    positions = {c.source: c.model.config.block_size for c in candidates}
    trained = {source: run_settings(source).get("block_size") for source in positions}
    trained = {source: n if isinstance(n, int) else positions[source] for source, n in trained.items()}
    least, source = min(positions, key=positions.get), min(trained, key=trained.get)
    most = positions[least]
    if block_size > most:
        raise UserError(f"block_size {block_size} is beyond the {most} positions of {least}")
    if not block_size and trained[source] < most:
        ranks.say(f"note: windows of {trained[source]} tokens, as {source} was trained on, though the models can see "
                  f"{most}: --block_size={most}")
    return block_size or min(trained[source], most)


# --- which data


def prepare(names, candidates):
    """{name: its folder in data/}, made by prepare_owt.py if need be, and checked before hours are spent. UserError."""
    model, directory = candidates[0].model, candidates[0].directory
    folders = {}
    for name in names:
        folder, args, there = name, [], os.path.exists(os.path.join("data", name))
        if os.path.isfile(name):
            folder, there = "eval_" + re.sub(r"[^\w.-]+", "_", name).strip("._"), False
            tokenizer = tokenizer_of(model, directory).name
            args = [f"--files={glob.escape(name)}", f"--tokenizer={tokenizer}", "--val_every=1", "--force"]
        elif name in HUB and not there:
            if model.config.vocab_size <= 50256:
                raise UserError(f"{name} comes in GPT-2's 50,257 tokens, and the models have {model.config.vocab_size}")
            args = [f"--tokens={PUBLISHED.get(name, 10_000_000) + 100_000}", "--val_every=1"]
        elif name != "stdlib" and not there:
            raise UserError(f"unknown data set {name!r}: it is {', '.join(HUB)}, stdlib, hellaswag, residual, "
                            f"circuits, a text file or what `python prepare_owt.py --dataset={name} --files=...` makes")
        if folder in folders.values():
            raise UserError(f"--dataset={dataset}: two of them would be data/{folder}: rename {name}")
        folders[name] = folder
        if ranks.RANK == 0 and not there:
            print(f"preparing data/{folder}", flush=True)
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_owt.py")
            done = subprocess.run([sys.executable, script, f"--dataset={folder}", *args], stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(1)  # it has said why
        open_tokens(folder, "val", block_size, model.config.vocab_size)
        check_tokens(folder, "val")
        for c in candidates:
            note = check_data(folder, read_meta(folder), c.model, c.directory, any_tokenizer)
            if note:
                ranks.say(note)
    return folders


# --- what is measured: a dict for each model, as in the JSON


def cross_entropy(folder, candidates, original, faithful_to, autocast):
    """original: the source that the runs began with, or None; faithful_to: the reference of KL and so on, or None."""
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    n = min(tokens or PUBLISHED.get(folder, len(data)), len(data)) // block_size
    if n < 1:
        raise UserError(f"--tokens={tokens} is less than one window of {block_size}")
    starts = val_starts(data, n, block_size)
    own, n = starts[ranks.RANK :: ranks.WORLD], len(starts) * block_size
    models = {c.source: c.model for c in candidates}
    found = measure(models, faithful_to, data, own, block_size, batch_size, device, autocast)
    for arrays in found.values():
        for key in arrays:
            arrays[key] = ranks.gather_rows(arrays[key])  # (windows, block_size) or (windows,)
    meta = read_meta(folder)
    documents = meta["val"].get("documents")
    count = "documents" if documents is None else f"{documents:,} documents"
    not_published = ""
    if folder == "owt" and documents != NANOGPT_VAL_DOCUMENTS:
        not_published = ("they are over nanoGPT's val split, and data/owt has other documents: "
                         "`prepare_owt.py --dataset=owt` without --tokens makes it")
    elif folder in PUBLISHED and abs(n / PUBLISHED[folder] - 1) > 0.02:
        not_published = f"they are over {PUBLISHED[folder]:,} tokens, and this is over {n:,}"
    has_control = any(c.role == "control" for c in candidates)
    rows = []
    for c in candidates:
        mine = found[c.source]
        losses = mine["loss"]
        row = dict(windows=len(losses), tokens=losses.size, nonfinite=int((~np.isfinite(losses)).sum()),
                   val=f"{count} of {meta.get('source', 'an unknown source')}", not_published=not_published,
                   to_original_source=original if c.role != "original" else None, gap_to=None)
        row["median"], row["p99_9"], row["max"] = np.quantile(losses, [0.5, 0.999, 1])
        if c.role in ("ln_free", "part"):
            row["gap_to"] = control_of(c, candidates) if has_control else original
        by_window = dict(loss=losses.mean(1))
        for key, other in (("gap", row["gap_to"]), ("to_original", row["to_original_source"])):
            by_window[key] = losses.mean(1) - found[other]["loss"].mean(1) if other else None
        if faithful_to:
            by_window["entropy"] = mine["entropy"]
            row["calibration"] = calibration_error(mine["confidence"].ravel(), mine["hit"].ravel())
        if faithful_to and c.source != faithful_to:
            by_window |= {key: mine[key] for key in ("kl", "js", "agree")}
            row["reference"] = faithful_to
            row["correlation"] = np.corrcoef(losses.ravel(), found[faithful_to]["loss"].ravel())[0, 1]
        for key, windows in by_window.items():
            row[key], row[key + "_se"] = (None, None) if windows is None else mean_and_error(windows)
        row["loss_by_position"] = losses.mean(0, dtype=np.float64).tolist()
        rows.append(row)
    return rows


def residual(folder, candidates, autocast):
    """On rank 0; the other ranks return []."""
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    starts = val_starts(data, max(1, min(tokens or 100_000, len(data)) // block_size), block_size)
    rows = []
    for c in candidates if ranks.RANK == 0 else []:
        c.model.config.eot = read_meta(folder)["eot"]
        bar = tqdm(range(0, len(starts), batch_size), c.source, unit="batch", leave=False, disable=None)
        batches = (read_windows(data, starts[i : i + batch_size], block_size, device)[0] for i in bar)
        with autocast:
            rows.append(dict(data=folder, windows=len(starts)) | residual_stats(c.model, batches))
    return rows


def circuits(folder, candidates, reference):
    """How alike each model's circuits are to the reference's, and how much less than its control's. On rank 0."""
    if ranks.RANK > 0:
        return []
    data = open_tokens(folder, "val", block_size, candidates[0].model.config.vocab_size)
    starts = val_starts(data, max(1, min(tokens or 10_000, len(data)) // block_size), block_size)
    bar = tqdm(starts, "circuits", unit="window", leave=False, disable=None)
    windows = ([part[0] for part in read_windows(data, [start], block_size, device)] for start in bar)
    found = resemblance({c.source: c.model for c in candidates}, reference, windows)
    rows = []
    for c in candidates:
        mine, theirs = found[c.source], found[reference]
        by_head = {key: mine[key] for key in ("prefix_matching", "copying")}
        row = dict(data=folder, windows=len(starts), reference=reference)
        if c.source != reference:
            by_head["attention_js"] = mine["attention_js"].mean(0)
            row |= dict(cka=mine["cka"].mean(), cosine_by_layer=mine["cosine"].mean(0).tolist(),
                        cka_by_layer=mine["cka"].tolist())
            for key in ("prefix_matching", "copying"):
                row[key] = np.corrcoef(mine[key].ravel(), theirs[key].ravel())[0, 1]
            control = found.get(control_of(c, candidates), {}) if c.role == "ln_free" else {}
            for key in ("cosine", "attention_js", "contributions", "effects"):
                values, of_control = (m[key].reshape(len(starts), -1).mean(1) if key in m else None
                                      for m in (mine, control))
                row[key], row[key + "_se"] = mean_and_error(values)
                if of_control is not None:
                    row[key + "_gap"], row[key + "_gap_se"] = mean_and_error(values - of_control)
        rows.append(row | {key + "_by_head": values.tolist() for key, values in by_head.items()})
    return rows


def control_of(c, candidates):
    """The source of its own control, or of the only one; None if there is none, or there are several."""
    controls = [other.source for other in candidates if other.role == "control"]
    return next((s for s in controls if s == c.source + "_control" or len(controls) == 1), None)


def hellaswag_accuracies(candidates, autocast):
    examples = hellaswag.fetch_examples()
    tokenizer = tokenizer_of(candidates[0].model, candidates[0].directory)
    labels = np.array([example.label for example in examples])
    rows = []
    for c in candidates:
        name = c.source if ranks.RANK == 0 else ""
        own = examples[ranks.RANK :: ranks.WORLD]
        scores = hellaswag.score(c.model, own, lambda text: tokenizer.encode(text).tolist(), device, autocast, name)
        rows.append(dict(examples=len(examples)) | hellaswag.accuracies(*map(ranks.gather_rows, scores), labels))
    return rows


# --- tables and JSON


def show(rows):
    """The table of a data set's rows, and notes on how to read it."""
    first, name, word = rows[0], rows[0]["dataset"], token_word(rows[0]["dataset"])
    lines = []
    if name == "hellaswag":
        title = f"{name}: share of right endings ± binomial standard error, {first['examples']:,} examples"
    elif name == "residual":
        sites = list(max((row["sites"] for row in rows), key=len))  # the deepest model has the most
        shown = list(dict.fromkeys(sites[round(i * (len(sites) - 1) / 5)] for i in range(6)))  # a screenful
        title = (f"residual: std before {len(shown)} of {len(sites)} sites (--json has all), mean ± spread\n"
                 f"over tokens of {first['windows']:,} windows of {block_size} of data/{first['data']}")
        for site, kind in itertools.product(shown, ("position_0", "eot", "others")):
            stds = [row["sites"].get(site, {}).get(kind) or {} for row in rows]
            numbers = [with_error(std.get("mean"), std.get("spread"), ".3f") for std in stds]
            lines.append([f"{site} {kind.replace('_', ' ')}", *numbers])
    elif name == "circuits":
        title = (f"circuits: likeness to {first['reference']} ± standard error (--json has layers and heads)\n"
                 f"over {first['windows']:,} windows of {block_size} of data/{first['data']}")
    else:
        title = (f"{name}: cross-entropy in nats per {word} ± standard error\n"
                 f"over {first['windows']:,} windows of {block_size} val tokens, of {first['val']}")
    controls = sum(row["role"] == "control" for row in rows)
    for key, label, form in LINES:
        if (key != "gap" or controls) and (key != "nonfinite" or any(row.get(key) for row in rows)):
            label = label.format(word=word, control="its control" if controls > 1 else "control")
            lines.append([label, *(with_error(row.get(key), row.get(key + "_se"), form) for row in rows)])
    print_table(title, rows, lines)
    if first.get("not_published"):
        print(f"note: not to be compared with the published figures: {first['not_published']}")


def print_table(title, rows, lines):
    """Models side by side; those that don't fit into WIDTH stand below. lines: [label, a cell for each model]; lines
    with empty cells only are left out."""
    roles = [TITLES[row["role"]] for row in rows]
    names = [f"{role} {roles[:i].count(role) + 1}" * (roles.count(role) > 1) or role for i, role in enumerate(roles)]
    lines = [["", *names], *(line for line in lines if any(line[1:]))]
    label_width = max(len(line[0]) for line in lines)
    width = max(len(cell) for line in lines for cell in line[1:])
    beside = max(1, (WIDTH - label_width) // (2 + width))
    print("", *(textwrap.fill(line, WIDTH) for line in title.splitlines()), sep="\n")
    for name, row in zip(names, rows):
        print(f"  {name:<{max(map(len, names))}}  {row['source']}")
    for i in range(0, len(rows), beside):
        print()
        for label, *row in lines:
            row = [cell.rjust(width) for cell in row[i : i + beside]]
            print("  ".join([label.ljust(label_width), *row]).rstrip())


def verify_models(sources):
    """Print a verdict for each model. Exit code 1 if one is not LN-free."""
    reasons = {source: problems(GPT.from_pretrained(model_directory(source)).eval()) for source in sources}
    for source, found in reasons.items():
        verdict = "NOT LN-free" if found else "LN-free: all that reads the residual stream is affine in it"
        print("\n  ".join([f"{source}: {verdict}", *found]))
    sys.exit(1 if any(reasons.values()) else 0)


def open_all(run):
    """(candidates, the data sets' names, {name: folder in data/}) of the settings and the run. Sets block_size."""
    global block_size
    sources, default = items(models), ""
    if run or not sources:
        run = run or last_removal()
        settings = run_settings(run)
        original = [settings["init_from"]] if settings.get("init_from", "scratch") != "scratch" else []
        control = [run + "_control"] if os.path.isdir(run + "_control/model") else []
        sources = list(dict.fromkeys([*original, *control, run, *sources]))
        default = settings.get("dataset", "")
    if reference and reference not in sources:
        sources.insert(0, reference)
    candidates = [open_candidate(source) for source in sources]
    sizes = {c.model.config.vocab_size: c.source for c in candidates}
    if len(sizes) > 1:
        raise UserError(f"{' and '.join(sizes.values())} have vocabularies of {' and '.join(map(str, sizes))} tokens")
    tokenizers = {fingerprint_of(c.model, c.directory): c.source for c in candidates}
    tokenizers.pop("", None)  # those that are not known
    if len(tokenizers) > 1 and not any_tokenizer:
        raise UserError(f"{' and '.join(tokenizers.values())} have different tokenizers: --any_tokenizer goes on")
    block_size = window_of(candidates)
    default = default or ("owt" if candidates[0].model.config.vocab_size > 50256 else "stdlib")
    names = items(dataset) or [default]
    token_files = [name for name in names if name not in ("hellaswag", "residual", "circuits")]
    folders = prepare(token_files or [default] * bool({"residual", "circuits"} & set(names)), candidates)
    shapes = {tuple(getattr(c.model.config, key) for key in ("n_layer", "n_head", "n_embd")) for c in candidates}
    if "circuits" in names and (len(shapes) > 1 or any(c.role == "part" for c in candidates)):
        raise UserError("--dataset=circuits compares models of one shape, each with all its LayerNorms or with none")
    if "hellaswag" in names:
        hellaswag.fetch_examples()
        tokenizer_of(candidates[0].model, candidates[0].directory)
    return candidates, names, folders


def main():
    global device
    run = take_source()
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(batch_size=1),
              choices=dict(dtype=("float32", "bfloat16")))
    if json:
        check_file(json, ["command", "rows"])
        if not os.path.isdir(os.path.dirname(json) or "."):
            raise UserError(f"--json={json}: there is no directory {os.path.dirname(json)}")
    if verify:
        verify_models(items(models) or [run or last_removal()])

    ranks.use_all_gpus(device)
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment asks for
    device = pick_device(device)
    autocast = autocast_to(getattr(torch, dtype), device)
    ranks.join("cpu")  # gloo: a few results at the end, whatever the device

    with ranks.rank_0_first():  # rank 0 downloads and prepares
        candidates, names, folders = open_all(run)
    runs = [c.source for c in candidates if c.role == "ln_free" and run_settings(c.source)]
    paths = [json] if json else [os.path.join(run, "eval.json") for run in runs if os.access(run, os.W_OK)]
    for path in paths:
        check_file(path, ["command", "rows"])
    for c in candidates:
        c.model.to(device)
        if dtype == "bfloat16":
            cast_linear_maps(c.model)
    # the runs began with the first original, but not with one that is only there as the --reference
    originals = [c.source for c in candidates if c.role == "original"]
    original = next((source for source in originals if source != reference), originals[0] if originals else None)
    faithful_to = (reference or original or candidates[0].source) if faithfulness else None

    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    result = dict(command=shlex.join(["python", *sys.argv]), versions=versions, dtype=dtype, device=device,
                  data_sha256={}, weights_sha256={c.source: c.sha256 for c in candidates}, rows=[])
    for name in names:
        if name == "hellaswag":
            measured = hellaswag_accuracies(candidates, autocast)
        elif name == "residual":
            measured = residual(next(iter(folders.values())), candidates, autocast)
        elif name == "circuits":
            measured = circuits(next(iter(folders.values())), candidates, faithful_to or candidates[0].source)
        else:
            name = folders[name]
            measured = cross_entropy(name, candidates, original, faithful_to, autocast)
            result["data_sha256"][name] = read_meta(name)["val"].get("sha256")
        if ranks.RANK == 0:
            found = [dict(dataset=name, source=c.source, role=c.role) | row for c, row in zip(candidates, measured)]
            result["rows"] += found
            for path in paths:  # before it is shown, which can fail; parse_json turns NaN into None
                if json or any("loss" in row for row in result["rows"]):  # what a card shows
                    write_json(path, parse_json(dumps(result, default=float)))
            show(found)
    commands = [command("tools.plot", json)] * bool(json and {"residual", "circuits"} & set(names))
    if runs:
        commands += [command("tools.plot", runs[-1]), command("tools.export", runs[-1], "--to=hf")]
    if ranks.RANK == 0:
        say_next(*commands)
    ranks.leave()


if __name__ == "__main__":
    main()
