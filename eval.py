"""
What a removal cost: the original, the control and the LN-free model on the same windows, side by side.

    python eval.py                                            # the last run under out/, on its own val set
    python eval.py --dataset=owt,pile,hellaswag,residual      # what is not there yet is fetched
    python eval.py --models=gpt2,ORG/NAME@REVISION,out/mine --dataset=pile --json=result.json   # without --dataset: owt, or stdlib for bytes
    python eval.py --verify                                   # is it really LN-free?
    torchrun --nproc_per_node=8 eval.py --dataset=pile        # the same result, sooner

An LN-free model is folded first, so that what is measured has no LayerNorm in it. Windows don't overlap, and are the same for all
models. A standard error is over windows, taken as independent of each other (a document can reach over several); that of a difference
is over the windows' differences. KL and Jensen-Shannon divergence are of the next token's distribution, in nats per token.
"""
import glob
import hashlib
import math
import os
import platform
import shlex
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from json import dump, load

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from tqdm import tqdm

import hellaswag
import residual
from configurator import configure, one_line_errors
from files import check_file
from data import open_tokens, pick_device, read_meta, read_windows, val_starts
from model import GPT

# -----------------------------------------------------------------------------
dataset = ""  # comma-separated: owt, pile, pile-filtered, stdlib, a folder under data/, a text file, hellaswag, residual; by default the last run's
models = ""  # comma-separated model directories, out_dirs or hub repositories; by default the last run's original, control and LN-free model
reference = ""  # the model that faithfulness is to; by default the original
faithfulness = True  # KL, JS, top-1 agreement and correlation of token losses, against the reference
verify = False  # only test that the models are LN-free (by default the last run's), and fail if one is not
tokens = 0  # how many val tokens, spread evenly; 0: as published (owt 4.5 M, pile 10.2 M), else all of them
block_size = 0  # tokens in a window; 0: the smallest context of the models
batch_size = 16  # windows at a time
device = "auto"  # cuda, mps or cpu, the first that is there
dtype = "float32"  # or bfloat16: autocast
json = ""  # a file to write everything into
hellaswag_url = hellaswag.URL
# -----------------------------------------------------------------------------

PUBLISHED = {"owt": 4_500_000, "pile": 10_200_000, "pile-filtered": 10_200_000}  # tokens behind the published figures
HEAD_ROWS = 128  # tokens whose distributions exist at one time; on a GPU 8 times as many, as model.pieces does
NAMES = dict(original="original", control="control", ln_free="LN-free", part="part removed")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# --- what is compared


def items(text):
    """The items of a comma-separated list, each once."""
    return list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))


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
    sources = [settings["init_from"]] if settings["init_from"] != "scratch" else []
    return sources + [run + "_control"] * os.path.isdir(run + "_control/model") + [run], settings["dataset"]


def open_model(source, fold=True):
    """(role, model) of a model source or a run's out_dir; the LN-free ones come folded, unless fold is False."""
    run = os.path.isdir(os.path.join(source, "model"))
    model = GPT.from_pretrained(os.path.join(source, "model") if run else source).eval()
    if model.ln_free():
        return "ln_free", model.fold() if fold and not model.config.folded else model
    if "fake" in model.ln_modes().values():
        return "part", model
    return "control" if run else "original", model


def prepared(name, config):
    """The folder under data/ that holds `name`, made by prepare_owt.py if need be. ValueError: there is no such data set, or none for
    models of this config."""
    if os.path.isfile(name):
        folder = "eval_" + os.path.basename(name)
        tokenizer = "gpt2" if config.eot == 50256 else "bytes"
        args = [f"--dataset={folder}", f"--files={glob.escape(name)}", f"--tokenizer={tokenizer}", "--val_every=1", "--force"]
    elif os.path.exists(os.path.join("data", name)):
        return name
    elif name in PUBLISHED and config.vocab_size <= 50256:
        raise ValueError(f"{name} is fetched as GPT-2's 50,257 tokens, but the models have a vocabulary of {config.vocab_size}")
    elif name in (*PUBLISHED, "stdlib"):
        folder = name
        args = [f"--dataset={name}"] + ([f"--tokens={PUBLISHED[name] + 100_000}", "--val_every=1"] if name in PUBLISHED else [])
    else:
        there = sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob("data/*/meta.json"))
        known = ", ".join(dict.fromkeys([*there, "stdlib", *PUBLISHED, "hellaswag", "residual"]))
        raise ValueError(f"unknown data set {name!r}: there is {known}, or a text file's path; for text of your own run "
                         f"`python prepare_owt.py --dataset={name} --files=...`")
    if RANK == 0:
        print(f"preparing data/{folder}", flush=True)
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prepare_owt.py")
        if subprocess.run([sys.executable, script, *args], stdout=subprocess.DEVNULL).returncode:
            sys.exit(1)  # its line stands above
    return folder


def encoder(model):
    """text -> token ids, by the model's end-of-text id."""
    if model.config.eot == 256:
        return lambda text: list(text.encode())
    if model.config.eot != 50256:
        raise ValueError(f"end-of-text is {model.config.eot}, which is neither GPT-2's tokenizer nor bytes: HellaSwag can't be tokenized for it")
    return tiktoken.get_encoding("gpt2").encode_ordinary


def autocast():
    return torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def cast_linear_maps(model):
    """What autocast would do to the weights of the linear maps at each call, once."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight = torch.nn.Parameter(m.weight.bfloat16())
            m.bias = None if m.bias is None else torch.nn.Parameter(m.bias.bfloat16())


def over_processes(array):
    """Rows RANK, RANK + WORLD, ... of an array, one from each process -> the whole array on each."""
    if WORLD == 1:
        return array
    parts = [None] * WORLD
    dist.all_gather_object(parts, array)
    whole = np.empty((sum(map(len, parts)), *array.shape[1:]), array.dtype)
    for rank, part in enumerate(parts):
        whole[rank::WORLD] = part
    return whole


# --- cross-entropy and faithfulness


@torch.inference_mode()
def token_stats(opened, data, starts, reference):
    """{source: {"loss": (windows, T), and against the reference's "kl", "js", "agree" (windows,)}}; reference None: losses alone."""
    order = sorted(opened, key=lambda item: item[0] != reference)  # the reference first
    own = starts[RANK::WORLD]
    stats = {source: dict(loss=np.zeros((len(own), block_size), np.float32)) for source, _, _ in opened}
    for source in stats.keys() - {reference} if reference else ():  # in this order below
        stats[source] |= {key: np.zeros(len(own)) for key in ("kl", "js", "agree")}
    for i in tqdm(range(0, len(own), batch_size), desc="windows", unit="batch", leave=False, disable=None if RANK == 0 else True):
        x, y = read_windows(data, own[i : i + batch_size], block_size, device)
        with autocast():
            hidden = {source: model.normed(*model.residual(x)).flatten(0, 1) for source, _, model in order}  # (B T, C)
            if reference is None:
                for source, _, model in order:
                    stats[source]["loss"][i : i + batch_size] = model.token_losses(hidden[source], y.flatten()).view(y.shape).cpu()
                continue
            found = {source: torch.zeros(len(parts), y.numel()) for source, parts in stats.items()}
            n = HEAD_ROWS if x.is_cpu else 8 * HEAD_ROWS
            for rows in (slice(r, r + n) for r in range(0, y.numel(), n)):
                for source, _, model in order:
                    log_p = model.lm_head(hidden[source][rows]).float().log_softmax(-1)  # (rows, vocab)
                    loss = -log_p.gather(1, y.flatten()[rows].unsqueeze(1))[:, 0]
                    if source == reference:
                        log_q, q = log_p, log_p.exp()
                        found[source][0, rows] = loss.cpu()
                        continue
                    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
                    kl, js = (q * (log_q - log_p)).sum(-1), ((q * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
                    found[source][:, rows] = torch.stack([loss, kl, js, log_p.argmax(-1) == log_q.argmax(-1)]).cpu()
        for source, parts in stats.items():
            for (key, part), values in zip(parts.items(), found[source].view(-1, *y.shape)):
                part[i : i + batch_size] = values if key == "loss" else values.double().mean(-1)
    return {source: {key: over_processes(a) for key, a in parts.items()} for source, parts in stats.items()}


def mean_and_error(windows):
    """Mean over the windows' means (windows,), and its standard error."""
    windows = windows.astype(np.float64)
    return windows.mean(), windows.std(ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else float("nan")


def cross_entropy_rows(name, opened, reference):
    """One JSON row for each model."""
    data = open_tokens(name, "val", block_size, opened[0][2].config.vocab_size)
    n = min(tokens or PUBLISHED.get(name, len(data)), len(data)) // block_size
    if n < 1:
        raise ValueError(f"--tokens={tokens} is less than one window of {block_size}")
    starts = val_starts(data, n, block_size)
    stats = token_stats(opened, data, starts, reference)
    first = {role: next((s for s, r, _ in opened if r == role), None) for role in ("original", "control")}
    rows = []
    for source, role, _ in opened:
        losses = stats[source]["loss"]
        row = dict(dataset=name, source=source, role=role, windows=len(starts), tokens=losses.size, nonfinite=int((~np.isfinite(losses)).sum()))
        row["loss"], row["loss_se"] = mean_and_error(losses.mean(1))
        row["median"], row["p99_9"], row["max"] = np.quantile(losses, [0.5, 0.999, 1])
        gap_to = (first["control"] or first["original"]) if role in ("ln_free", "part") else None
        for key, base in (("gap", gap_to), ("to_original", first["original"] if role != "original" else None)):
            row[key], row[key + "_se"] = mean_and_error(losses.mean(1) - stats[base]["loss"].mean(1)) if base else (None, None)
            row[key + ("_to" if key == "gap" else "_source")] = base
        if "kl" in stats[source]:
            for key in ("kl", "js", "agree"):
                row[key], row[key + "_se"] = mean_and_error(stats[source][key])
            row["correlation"], row["reference"] = np.corrcoef(losses.ravel(), stats[reference]["loss"].ravel())[0, 1], reference
        row["loss_by_position"] = losses.mean(0, dtype=np.float64).tolist()
        rows.append(row)
    return rows


def residual_rows(name, opened):
    """One JSON row for each model."""
    data = open_tokens(name, "val", block_size, opened[0][2].config.vocab_size)
    starts = val_starts(data, max(1, min(tokens or 100_000, len(data)) // block_size), block_size)
    rows = []
    for source, role, model in opened:
        batches = (read_windows(data, starts[i : i + batch_size], block_size, device)[0] for i in range(0, len(starts), batch_size))
        with autocast():
            stats = residual.stats(model, tqdm(batches, total=-(-len(starts) // batch_size), desc=source, unit="batch", leave=False, disable=None))
        rows.append(dict(dataset="residual", source=source, role=role, data=name, windows=len(starts), **stats))
    return rows


def hellaswag_rows(examples, encode, opened):
    """One JSON row for each model."""
    rows = []
    for source, role, model in opened:
        scores = hellaswag.score(model, examples[RANK::WORLD], encode, device, autocast(), source if RANK == 0 else "")
        sums, counts = (over_processes(a) for a in scores)
        accuracies = hellaswag.accuracies(sums, counts, np.array([label for *_, label in examples]))
        rows.append(dict(dataset="hellaswag", source=source, role=role, examples=len(examples), **accuracies))
    return rows


# --- tables


def print_table(title, opened, lines):
    """Models side by side: lines of [label, a cell for each model]."""
    cells = [["", *(NAMES[role] for _, role, _ in opened)], ["", *(source for source, _, _ in opened)], *(line for line in lines if any(line[1:]))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n" + title)
    for line in cells:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


def with_error(row, key, form):
    return "" if row.get(key) is None else f"{row[key]:{form}} ± {row[key + '_se']:{form.lstrip('+')}}"


def show_cross_entropy(name, opened, rows):
    cell = lambda key, form=".4f": [f"{r[key]:{form}}" if r.get(key) is not None else "" for r in rows]
    print_table(
        f"{name}: cross-entropy in nats per token ± standard error over {rows[0]['windows']:,} windows of {block_size} val tokens", opened,
        [[name, *(with_error(r, "loss", ".4f") for r in rows)],
         ["gap to control" if any(r["role"] == "control" for r in rows) else "gap to original", *(with_error(r, "gap", "+.4f") for r in rows)],
         ["minus original", *(with_error(r, "to_original", "+.4f") for r in rows)],
         ["median token", *cell("median")], ["99.9th percentile", *cell("p99_9")], ["largest", *cell("max")],
         ["not finite", *(f"{r['nonfinite']:,} tokens" if r["nonfinite"] else "" for r in rows)],
         ["KL from reference", *(with_error(r, "kl", ".4f") for r in rows)], ["Jensen-Shannon", *(with_error(r, "js", ".4f") for r in rows)],
         ["same top token", *cell("agree", ".2%")], ["loss correlation", *cell("correlation")]])


def show_residual(name, opened, rows):
    sites = list(max((r["sites"] for r in rows), key=len))  # of the deepest model

    def cells(site, kind):
        found = [r["sites"].get(site, {}).get(kind) for r in rows]
        return [f"{std['mean']:.3f} ± {std['spread']:.3f}" if std else "none" for std in found]

    title = f"residual: std before each site on data/{name}, mean ± spread over tokens, in {rows[0]['windows']:,} windows of {block_size}"
    print_table(title, opened,
                [[f"{site}, {kind.replace('_', ' ')}", *cells(site, kind)] for site in sites for kind in ("position_0", "eot", "others")]
                + [["attention sink rate", *(f"{r['sink_rate']:.1%}" for r in rows)]])


def show_hellaswag(name, opened, rows):
    print_table(f"hellaswag: share of right endings ± binomial standard error, {rows[0]['examples']:,} examples", opened,
                [["length-normalised", *(with_error(r, "acc_norm", ".2%") for r in rows)],
                 ["accuracy", *(with_error(r, "acc", ".2%") for r in rows)]])


def finite(value):
    """For JSON, which has no NaN: None instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, (float, np.floating)) and not math.isfinite(value) else float(value) if isinstance(value, np.floating) else value


def weights_hash(model):
    digest = hashlib.sha256()
    for p in model.state_dict().values():
        digest.update(p.cpu().contiguous().view(torch.uint8).numpy() if p.dim() else p.cpu().numpy().tobytes())
    return digest.hexdigest()


def main():
    global block_size, device
    configure(globals(), sys.argv[1:], __doc__)
    if dtype not in ("float32", "bfloat16"):
        sys.exit(f"error: dtype is {dtype!r}, but it must be float32 or bfloat16")
    if batch_size < 1 or tokens < 0 or block_size < 0:
        sys.exit("error: batch_size must be 1 or more, tokens and block_size 0 or more")
    with one_line_errors():
        device = pick_device(device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if WORLD > 1 and not verify:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))  # a few results at the end, whatever the device; rank 0 may fetch for long
        if RANK > 0:
            dist.barrier()  # rank 0 goes first, fetches and prepares
    with one_line_errors():
        if json and not os.path.isdir(os.path.dirname(json) or "."):
            raise FileNotFoundError(f"--json={json}: there is no directory {os.path.dirname(json)}")
        if os.path.isdir(json):
            raise IsADirectoryError(f"--json={json} is a directory: name a file")
        if json:
            check_file(json, ["command", "rows"])
        sources, last_dataset = (items(models), "") if items(models) else last_run()
        if verify:
            sys.exit(show_verify(sources if items(models) else sources[-1:]) if RANK == 0 else 0)
        if reference and reference not in sources:
            sources.insert(0, reference)
        opened = [(source, *open_model(source)) for source in sources]
        last_dataset = last_dataset or ("owt" if opened[0][2].config.vocab_size > 50256 else "stdlib")
        names = items(dataset) or [last_dataset]
        for source, _, model in opened:
            if model.config.vocab_size != opened[0][2].config.vocab_size:
                raise ValueError(f"{opened[0][0]} has a vocabulary of {opened[0][2].config.vocab_size} and {source} one of {model.config.vocab_size}: "
                                 "compare models of one tokenizer")
            if block_size > model.config.block_size:
                raise ValueError(f"block_size {block_size} is beyond the {model.config.block_size} positions of {source}")
            model.to(device)
        weights = {source: weights_hash(model) for source, _, model in opened} if json and RANK == 0 else {}
        for _, _, model in opened if dtype == "bfloat16" else ():
            cast_linear_maps(model)
        block_size = block_size or min(model.config.block_size for _, _, model in opened)
        base = reference or next((s for s, role, _ in opened if role == "original"), sources[0])
        folders = {name: prepared(name, opened[0][2].config) for name in names if name not in ("hellaswag", "residual")}
        for folder in folders.values():
            open_tokens(folder, "val", block_size, opened[0][2].config.vocab_size)  # what is wrong with one is said before hours of the others
            eot = read_meta(folder)["eot"]
            for source, _, model in opened if RANK == 0 else ():
                if model.config.eot != eot:
                    print(f"note: end-of-text is {eot} in data/{folder}, but {model.config.eot} in {source}: was it trained on such tokens?")
        if "hellaswag" in names:
            path = os.path.join("data", "hellaswag", "hellaswag_val.jsonl")
            hellaswag.download(hellaswag_url, path)
            examples, encode = hellaswag.read_examples(path), encoder(opened[0][2])
        if "residual" in names:
            residual_on = next(iter(folders.values()), None) or prepared(last_dataset, opened[0][2].config)
    if WORLD > 1 and RANK == 0:
        dist.barrier()

    rows, hashes = [], {}
    for name in names:
        with one_line_errors():
            if name == "hellaswag":
                folder, show, found = name, show_hellaswag, hellaswag_rows(examples, encode, opened)
            elif name == "residual":
                folder, show, found = residual_on, show_residual, residual_rows(residual_on, opened) if RANK == 0 else []
            else:
                folder, show = folders[name], show_cross_entropy
                found = cross_entropy_rows(folder, opened, base if faithfulness and len(opened) > 1 else None)
                hashes[folder] = read_meta(folder)["val"].get("sha256")
        rows += found
        if RANK == 0:
            show(folder, opened, found)
    if json and RANK == 0:
        versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        result = dict(command=shlex.join(["python", *sys.argv]), versions=versions, dtype=dtype, device=device,
                      data_sha256=hashes, weights_sha256=weights, rows=finite(rows))
        with one_line_errors():
            with open(json + ".tmp", "x") as f:
                dump(result, f, indent=2)
            os.replace(json + ".tmp", json)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def show_verify(sources):
    """Prints a verdict for each model; the exit code."""
    failed = False
    for source in sources:
        reasons = residual.why_not_ln_free(open_model(source, fold=False)[1])
        failed |= bool(reasons)
        print(f"{source}: " + ("\n  ".join(["NOT LN-free", *reasons]) if reasons else "LN-free: all that reads the residual stream is affine in it"))
    return int(failed)


if __name__ == "__main__":
    main()
