"""
Pictures of a run and of a residual stream.

    python -m tools.plot out/remove_ln_tiny   # loss against step, with every removal -> out/remove_ln_tiny/loss.png
    python -m tools.plot residual.json        # from eval.py --dataset=residual --json=residual.json -> residual.png
    python -m tools.plot circuits.json        # from eval.py --dataset=circuits --json=circuits.json -> circuits.png

A run is drawn beside its control, out/remove_ln_tiny_control, if there is one.
"""
import math
import os
import sys

from parts.errors import UserError, begin_script, command, say_next, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
from matplotlib.figure import Figure

from configurator import configure, take_source
from parts.data import token_word
from parts.files import read_json, run_settings, whole_file
from parts.run import log_entries

ROLES = dict(original="tab:gray", control="tab:blue", ln_free="tab:red", part="tab:orange")  # in every picture
COLORS = {"ln_2": "tab:green", "ln_1qk": "tab:purple", "ln_1v": "tab:brown", "ln_f": "black"}
BESIDE = dict(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # the legend covers no curve


# --- a run


def read_log(run):
    """A run's log.jsonl -> ({step: train loss}, {step: val loss}, [(step, kind)] of the removals). UserError."""
    path = os.path.join(run, "log.jsonl")
    with reading(path, f"is {run} the out_dir of a run?"):
        entries = [entry for _, entry in log_entries(path)]
        loss, val = ({entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}  # None: skipped
                     for key in ("loss", "val_loss"))
        kinds = [(entry["step"], entry["event"].split(".")[-1]) for entry in entries if "event" in entry]  # h.3.ln_2
        events = [(step, f"{kind} off" if kind in ("bos", "eot") else kind) for step, kind in kinds]
    return loss, val, events


def plot_run(run):
    """The losses of a run and its control, the gap between them on the same batches, and the removals."""
    loss, val, events = read_log(run)
    if not loss:
        raise UserError(f"{run}/log.jsonl has no step yet")
    has_control = os.path.exists(run + "_control/log.jsonl")
    old_loss, old_val, _ = read_log(run + "_control") if has_control else ({}, {}, [])
    fig = Figure(figsize=(13, 7), layout="constrained")
    top, low = fig.subplots(2, 1, sharex=True, height_ratios=(3, 2))

    settings = run_settings(run)
    draw_losses(top, loss, val, ROLES["ln_free"], "LN-free" if events else os.path.basename(run))
    if old_loss:
        draw_losses(top, old_loss, old_val, ROLES["control"], "control")
    top.legend(**BESIDE)
    top.set_title(run, fontsize=10, pad=60 if events else 6)  # above the names of the removals
    top.set_ylabel(f"loss, nats per {token_word(settings.get('dataset', ''))}")
    # a removal can throw the loss far up for a step or two: the axis leaves such steps out
    losses = np.array([*loss.values(), *val.values(), *old_loss.values()])
    top.set_ylim(losses.min() - 0.02, min(losses.max(), np.quantile(losses, 0.99) + 0.1) + 0.02)

    gap = {step: loss[step] - old_loss[step] for step in loss if step in old_loss}
    if gap:
        val_gap = {step: val[step] - old_val[step] for step in val if step in old_val}
        draw_losses(low, gap, val_gap, ROLES["ln_free"], "gap")
        gaps = np.array(list(gap.values()))
        low.set_ylim(min(gaps.min(), 0) - 0.005, np.quantile(gaps, 0.97) * 1.2 + 0.01)
        low.legend(**BESIDE)
    low.axhline(0, color=ROLES["control"], linewidth=0.8)
    low.set_ylabel("LN-free minus control")
    tokens = math.prod(settings.get(key, 0) for key in ("batch_size", "gradient_accumulation_steps", "block_size"))
    low.set_xlabel(f"step, of {tokens:,} tokens")

    if events:
        draw_events(top, low, events, loss)
    save(fig, os.path.join(run, "loss.png"))
    if events:
        say_next(command("tools.lens", run, "--prompt=TEXT"), command("tools.export", run, "--to=hf"))


def smoothed(values):
    """(n,) -> (n,): means over a window of about a 40th of them, narrower at the ends."""
    window = np.ones(2 * (len(values) // 80) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_losses(axis, loss, val, color, name):
    """{step: train loss}, each one and smoothed, and {step: val loss}."""
    steps, losses = list(loss.keys()), list(loss.values())
    axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.6, label=f"{name}, each step")
    axis.plot(steps, smoothed(losses), color=color, linewidth=1.2, label=f"{name}, smoothed")
    axis.plot(val.keys(), val.values(), "o", color=color, label=f"{name}, val", markersize=5)


def draw_events(top, low, events, loss):
    """A line at each removal, the name of each kind above its first one, and the highest loss of three steps from the
    last one as a number, because it can be beyond the axis."""
    left, right = top.get_xlim()
    place = -np.inf
    for kind in dict.fromkeys(kind for _, kind in events):
        steps = [step for step, name in events if name == kind]
        color = COLORS.get(kind, "tab:gray")
        for step in steps:
            for axis in (top, low):
                axis.axvline(step, color=color, linewidth=0.7, alpha=0.5 if len(events) < 40 else 0.25, zorder=0)
        place = max(steps[0], place + (right - left) / 70)  # beside the name before
        text = kind if len(steps) == 1 else f"{kind} x {len(steps)}"
        where = dict(transform=top.get_xaxis_transform(), rotation=90, ha="center", va="bottom")
        top.text(place, 1.01, text, fontsize=8, color=color, **where)
    last, kind = events[-1]
    step = max((step for step in loss if last <= step < last + 3), key=loss.get, default=None)
    if step is not None:
        at = step, min(loss[step], top.get_ylim()[1])
        side, ha = (-12, "right") if step > (left + right) / 2 else (12, "left")
        where = dict(textcoords="offset points", va="top", ha=ha, arrowprops=dict(arrowstyle="->", linewidth=0.8))
        top.annotate(f"{loss[step]:.2f} after {kind}", at, (side, -14), fontsize=8, **where)


# --- a residual stream


def read_rows(source):
    """A table of eval.py -> [(label, color, {site: {kind of token: (mean, spread) of the std}})]. UserError."""
    rows = []
    with reading(source, f"write it with `python eval.py --dataset=residual --json={source}`"):
        for row in read_json(source)["rows"]:
            if row["dataset"] != "residual":
                continue
            stds = {site: {kind: (float(std["mean"]), float(std["spread"])) for kind, std in kinds.items() if std}
                    for site, kinds in row["sites"].items()}  # None: the data has no such token
            role = row["role"].replace("ln_free", "LN-free")
            label = f"{role}: {row['source']}, attention sinks {row['sink_rate']:.1%}"
            rows.append((label.replace("$", r"\$"), ROLES[row["role"]], stds))  # no formula
        if not rows:
            raise ValueError("it has no row of --dataset=residual")
    return rows


def plot_residual(source):
    """The std before each site, a line for each model and a picture for each kind of token."""
    rows = read_rows(source)
    sites = list(max((stds for *_, stds in rows), key=len))  # the deepest model has the most
    every = -(-len(sites) // 16)
    kinds = [kind for kind in ("position_0", "eot", "others") if any(kind in stds["ln_f"] for *_, stds in rows)]
    fig = Figure(figsize=(5 * len(kinds), 5), layout="constrained")
    axes = fig.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds):
        for i, (label, color, stds) in enumerate(rows):
            mean, spread = np.array([stds.get(site, {}).get(kind, (np.nan, np.nan)) for site in sites]).T
            width = max(1, 5 - 2 * i)  # where lines coincide, the one below is wider
            axis.plot(sites, mean, "o-", color=color, markersize=3, linewidth=width, label=label)
            lower = np.maximum(mean - spread, mean / 10)  # the axis is logarithmic
            axis.fill_between(sites, lower, mean + spread, color=color, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(kind.replace("_", " "))
        axis.set_xticks(range(0, len(sites), every), sites[::every], rotation=90, fontsize=8)
    axes[0].set_ylabel("std before the site (band: spread over tokens)")
    fig.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save(fig, source.removesuffix(".json") + ".png")


# --- circuits


def read_circuits(source):
    """A table of eval.py -> [(role, {"prefix_matching_by_head", "copying_by_head": (L, heads), and for all but the
    reference "attention_js_by_head"})], the reference first. UserError."""
    with reading(source, f"write it with `python eval.py --dataset=circuits --json={source}`"):
        rows = [row for row in read_json(source)["rows"] if row["dataset"] == "circuits"]
        keys = ("prefix_matching_by_head", "copying_by_head", "attention_js_by_head")
        found = [(row["role"], {key: np.array(row[key], float) for key in keys if key in row}) for row in rows]
        found.sort(key=lambda item: len(item[1]))
        if not found or len(found[0][1]) != 2:
            raise ValueError("it has no rows of --dataset=circuits")
    return found


def plot_circuits(source):
    """Each head's scores against the reference's, and how far attention patterns are from the reference's, by layer."""
    (reference, theirs), *others = read_circuits(source)
    fig = Figure(figsize=(15, 5), layout="constrained")
    *axes, right = fig.subplots(1, 3)
    for axis, key in zip(axes, ("prefix_matching_by_head", "copying_by_head")):
        for role, ours in others:
            label = role.replace("ln_free", "LN-free")
            axis.plot(theirs[key].ravel(), ours[key].ravel(), "o", color=ROLES[role], label=label, alpha=0.7)
        ends = [*axis.get_xlim(), *axis.get_ylim()]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="equal")
        name = key.removesuffix("_by_head").replace("_", " ")
        axis.set(title=f"{name} score of each head", xlabel=reference, ylabel="the others")
    for role, ours in others:
        label = role.replace("ln_free", "LN-free")
        right.plot(ours["attention_js_by_head"].mean(1), "o-", color=ROLES[role], label=label)
    right.set(title="attention patterns, mean over heads", xlabel="layer",
              ylabel=f"Jensen-Shannon divergence to {reference}, nats", ylim=(0, None))
    for axis in (*axes, right):
        axis.legend()
    save(fig, source.removesuffix(".json") + ".png")


def check_picture(path):
    """UserError unless path is free, or a picture of ours in a run's folder, which is drawn anew."""
    folder, name = os.path.split(path)
    if not name.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"{path} does not end in .png, .pdf or .svg")
    if os.path.lexists(path) and not (name in ("loss.png", "lens.png", "circuits.png") and run_settings(folder)):
        raise UserError(f"{path} exists: move it away")


def save(fig, path):
    check_picture(path)
    with whole_file(path) as f:
        fig.savefig(f, format=path[-3:], dpi=120)
    print(path)


def main():
    source = take_source("python -m tools.plot OUT_DIR, or a .json file of eval.py")
    configure(globals(), sys.argv[1:], __doc__)
    if not source.endswith(".json"):
        return plot_run(source)
    with reading(source):
        names = {row["dataset"] for row in read_json(source)["rows"]}
    plot_circuits(source) if "circuits" in names else plot_residual(source)


if __name__ == "__main__":
    main()
