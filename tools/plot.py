"""
Pictures of a run and of a residual stream.

    python -m tools.plot out/remove_ln_tiny   # losses and removal events -> out/remove_ln_tiny/loss.png
    python -m tools.plot residual.json        # from eval.py --dataset=residual --json=residual.json -> residual.png

A run is drawn beside its control, such as out/remove_ln_tiny_control, if there is one.
"""
import os
import sys

from parts.errors import UserError, begin_script, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configurator import take_source
from parts.data import token_word
from parts.files import read_json, read_lines, run_settings, whole_file

KIND_COLORS = dict(ln_2="tab:green", ln_1qk="tab:purple", ln_1v="tab:brown", ln_f="black", eot="tab:gray",
                   bos="tab:gray")
TOKEN_KINDS = ("position_0", "eot", "others")


# --- a run


def read_log(run):
    """A run's log.jsonl -> {"loss": {step: train loss}, "val": {step: val loss}, "events": [(step, kind)]}."""
    path, advice = os.path.join(run, "log.jsonl"), f"is {run} the out_dir of a run?"
    loss, val, events = {}, {}, []
    with reading(path, advice):
        for _, entry in read_lines(path, advice):
            step = int(entry["step"])
            if entry.get("loss") is not None:  # None: the step was skipped
                loss[step] = float(entry["loss"])
            if entry.get("val_loss") is not None:
                val[step] = float(entry["val_loss"])
            if "event" in entry:
                kind = entry["event"].split(".")[-1]  # h.3.ln_2 -> ln_2
                events.append((step, kind + " off" if kind in ("bos", "eot") else kind))
        if not loss:
            raise ValueError("it has no step yet")
    return dict(loss=loss, val=val, events=events)


def plot_run(run):
    free, control = read_log(run), None
    if os.path.exists(run + "_control/log.jsonl"):
        control = read_log(run + "_control")
    try:
        unit = token_word(run_settings(run).get("dataset", ""))
    except UserError:  # the data set is gone
        unit = "token"
    fig, (top, low) = plt.subplots(2, 1, sharex=True, figsize=(13, 7), height_ratios=(3, 2), layout="constrained")
    fig.suptitle(os.path.basename(run).replace("$", r"\$"))  # no formula
    draw_losses(top, free, control, unit)
    draw_gap(low, free, control)
    draw_events(top, low, free["events"])
    save(fig, os.path.join(run, "loss.png"))
    if free["events"]:
        print(f"next: python -m tools.lens {run} --prompt=TEXT; python -m tools.export {run} --to=hf")


def smoothed(values):
    """(n,) -> (n,): means over a window of about a 40th of them, narrower at the ends."""
    half = len(values) // 80
    sums = np.cumsum([0, *values])
    i = np.arange(len(values))
    first, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def draw_losses(axis, free, control, unit):
    for log, name, color in ((free, "LN-free", "tab:red"), (control, "control", "tab:blue")):
        if log:
            draw_curve(axis, log["loss"], color, f"{name}, smoothed (thin: every step)")
            axis.plot(log["val"].keys(), log["val"].values(), "o", color=color, label=f"{name}, val", markersize=5)
    axis.set_ylabel(f"loss, nats per {unit}")
    legend_beside(axis)
    # an event can throw the loss far up for a step or two: the axis shows all but those
    losses = np.array([*free["loss"].values(), *free["val"].values(), *(control or free)["loss"].values()])
    axis.set_ylim(losses.min() - 0.02, min(losses.max(), np.quantile(losses, 0.99) + 0.1) + 0.02)
    last, kind = free["events"][-1] if free["events"] else (np.inf, "")
    step = min((step for step in free["loss"] if step >= last), default=None)
    if step is not None:
        at = step, min(free["loss"][step], axis.get_ylim()[1])
        arrow = dict(arrowstyle="->", color="black", linewidth=0.8)
        axis.annotate(f"{free['loss'][step]:.2f} right after {kind}", at, (12, -14), textcoords="offset points",
                      fontsize=8, va="top", arrowprops=arrow)


def draw_gap(axis, free, control):
    """LN-free minus control, on the same batches."""
    steps = sorted(free["loss"].keys() & control["loss"].keys()) if control else []
    if steps:
        gap = {step: free["loss"][step] - control["loss"][step] for step in steps}
        draw_curve(axis, gap, "tab:red", "same batches, smoothed")
        val_steps = sorted(free["val"].keys() & control["val"].keys())
        val_gap = [free["val"][step] - control["val"][step] for step in val_steps]
        axis.plot(val_steps, val_gap, "o", color="black", markersize=4, label="val")
        gap = np.array(list(gap.values()))
        axis.set_ylim(min(gap.min(), 0) - 0.005, np.quantile(gap, 0.97) * 1.2 + 0.01)
        legend_beside(axis)
    axis.axhline(0, color="tab:blue", linewidth=0.8)
    axis.set_ylabel("LN-free minus control")
    axis.set_xlabel("step")


def draw_curve(axis, values, color, label):
    """values {step: number}, thin, and smoothed."""
    axis.plot(values.keys(), values.values(), color=color, alpha=0.25, linewidth=0.6)
    axis.plot(values.keys(), smoothed(list(values.values())), color=color, linewidth=1.2, label=label)


def legend_beside(axis):
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def draw_events(top, low, events):
    """A vertical line for each event, and a name above the first event of each kind."""
    kinds = [kind for _, kind in events]
    colors = {kind: KIND_COLORS.get(kind.removesuffix(" off"), "black") for kind in kinds}
    for step, kind in events:
        for axis in (top, low):
            axis.axvline(step, color=colors[kind], linewidth=0.7, alpha=0.5 if len(events) < 40 else 0.25, zorder=0)
    left, right = top.get_xlim()
    x = -np.inf  # of the last name: the next one stands beside it
    for kind in colors:
        x = max(events[kinds.index(kind)][0], x + (right - left) / 70)
        name = kind if kinds.count(kind) == 1 else f"{kind} x {kinds.count(kind)}"
        top.text(x, 1.01, name.replace("$", r"\$"), fontsize=8, color=colors[kind], rotation=90, ha="center",
                 va="bottom", transform=top.get_xaxis_transform())


# --- a residual stream


def read_rows(path):
    """[(label, {site: {kind of token: (mean std, spread)}})] of the models in a JSON file of eval.py. UserError."""
    advice = f"write it with `python eval.py --dataset=residual --json={path}`"
    with reading(path, advice):
        models = []
        for row in read_json(path)["rows"]:
            if row["dataset"] == "residual":
                label = f"{row['role'].replace('ln_free', 'LN-free')}: {row['source']}, sinks {row['sink_rate']:.1%}"
                sites = {site: {kind: (float(std["mean"]), float(std["spread"])) for kind, std in kinds.items() if std}
                         for site, kinds in row["sites"].items()}
                models.append((label.replace("$", r"\$"), sites))
        if not any(sites for _, sites in models):
            raise ValueError("it has no row of --dataset=residual")
    return models


def plot_residual(path):
    """The std before each site, a line for each model; one plot for each kind of token."""
    models = read_rows(path)
    sites = list(max((sites for _, sites in models), key=len))  # the deepest model's
    shown = [kind for kind in TOKEN_KINDS if any(kind in kinds for _, found in models for kinds in found.values())]
    fig, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 5), layout="constrained", squeeze=False,
                             sharey=True)
    for axis, kind in zip(axes[0], shown):
        for i, (label, found) in enumerate(models):
            stds = [found.get(site, {}).get(kind, (np.nan, np.nan)) for site in sites]
            mean, spread = np.array(stds).T
            width = max(1, 5 - 2 * i)  # where lines coincide, the lower one is wider
            axis.plot(sites, mean, "o-", color=f"C{i}", markersize=3, linewidth=width, label=label)
            lower = np.maximum(mean - spread, mean / 10)  # the axis is logarithmic
            axis.fill_between(sites, lower, mean + spread, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(kind.replace("_", " "))
        every = -(-len(sites) // 16)
        axis.set_xticks(range(0, len(sites), every), sites[::every], rotation=90, fontsize=8)
    axes[0][0].set_ylabel("std before the site (band: spread over tokens)")
    fig.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save(fig, path.removesuffix(".json") + ".png")


# --- files


def check_picture(path):
    """UserError unless a picture may be written to path. Only our own is replaced: loss.png or lens.png of a run."""
    folder, name = os.path.split(path)
    if not path.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"{path} does not end in .png, .pdf or .svg")
    ours = name in ("loss.png", "lens.png") and run_settings(folder) and not os.path.islink(path)
    if os.path.lexists(path) and not ours:
        raise UserError(f"{path} exists: remove it, or choose another name")


def save(fig, path):
    check_picture(path)
    with whole_file(path) as f:
        fig.savefig(f, format=path[-3:], dpi=120)
    print(path)


def main():
    usage = "python -m tools.plot OUT_DIR, or a .json file of eval.py"
    source = take_source(usage)
    if not source:
        print(__doc__.strip())
    elif len(sys.argv) > 1:
        raise UserError(f"usage: {usage}")
    elif source.endswith(".json"):
        plot_residual(source)
    else:
        plot_run(source)


if __name__ == "__main__":
    main()
