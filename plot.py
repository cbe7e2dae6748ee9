"""
Pictures of a run and of a residual stream. Of a run: loss against step for the LN-free model and its control, with every removal
event marked and named.

    python plot.py out/remove_ln_tiny       # with out/remove_ln_tiny_control where it is there -> out/remove_ln_tiny/loss.png
    python plot.py residual.json            # of eval.py --dataset=residual --json=residual.json -> residual.png: the std before each site
"""
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLORS = dict(ln_2="tab:green", ln_1qk="tab:purple", ln_1v="tab:brown", ln_f="black", eot="tab:gray", bos="tab:gray")


def read_log(run):
    """{"step": train losses, "val": val losses, "events": names}, each {step: ...}, of a run's log.jsonl."""
    path = os.path.join(run, "log.jsonl")
    try:
        with open(path) as f:
            entries = [json.loads(line) for line in f]
    except OSError:
        sys.exit(f"error: {path} is not there: {run} is not the out_dir of a run")
    except json.JSONDecodeError as e:
        sys.exit(f"error: {path} is not a log of train.py: {e}")
    return dict(loss={e["step"]: e["loss"] for e in entries if "loss" in e}, val={e["step"]: e["val_loss"] for e in entries if "val_loss" in e},
                events=[(e["step"], e["event"]) for e in entries if "event" in e])


def plot_loss(run, path):
    """Above: val loss and every step's train loss. Below: LN-free minus control on the same batches."""
    free, control = read_log(run), None
    if not free["loss"]:
        sys.exit(f"error: {run}/log.jsonl has no step yet")
    if os.path.exists(run + "_control/log.jsonl"):
        control = read_log(run + "_control")
    fig, (top, low) = plt.subplots(2, 1, sharex=True, figsize=(13, 7), height_ratios=(3, 2), layout="constrained")
    for log, name, color in ((free, "LN-free", "tab:red"), (control, "control (LN kept)", "tab:blue")):
        if log:
            top.plot(log["loss"].keys(), log["loss"].values(), color=color, alpha=0.35, linewidth=0.8)
            top.plot(log["val"].keys(), log["val"].values(), "o-", color=color, label=f"{name}: val (thin: train)", markersize=4)
    top.set_ylabel("loss, nats per token")
    top.legend(loc="upper right", framealpha=1)
    # an event can throw the loss far up for a step or two; the axis follows all but those
    losses = np.array([*free["loss"].values(), *free["val"].values(), *(control or free)["loss"].values()])
    top.set_ylim(losses.min() - 0.02, min(losses.max(), np.quantile(losses, 0.99) + 0.1) + 0.02)

    if control:
        steps = sorted(free["loss"].keys() & control["loss"].keys())
        gap = np.array([free["loss"][s] - control["loss"][s] for s in steps])
        low.plot(steps, gap, color="tab:red", linewidth=0.8, label="train, same batches")
        both = sorted(free["val"].keys() & control["val"].keys())
        low.plot(both, [free["val"][s] - control["val"][s] for s in both], "o", color="black", markersize=4, label="val")
        low.set_ylim(min(gap.min(), 0) - 0.005, np.quantile(gap, 0.97) * 1.2 + 0.01)
        low.legend(loc="upper left", framealpha=1)
    low.axhline(0, color="tab:blue", linewidth=0.8)
    low.set_ylabel("LN-free minus control, nats")
    low.set_xlabel("step")

    by_step = {}
    for step, name in free["events"]:
        by_step.setdefault(step, []).append(name + (" off" if name in ("bos", "eot") else ""))
    for step, names in by_step.items():
        color = COLORS[names[0].removesuffix(" off").split(".")[-1]]
        for axis in (top, low):
            axis.axvline(step, color=color, linewidth=0.7, alpha=0.6)
        text = names[0] if len(names) == 1 else f"{names[0]} + {len(names) - 1} more" if len(names) > 3 else ", ".join(names)
        top.text(step, 1.01, text, transform=top.get_xaxis_transform(), rotation=90, fontsize=6.5, color=color, ha="center", va="bottom")
    save(fig, path, "loss of a run")


def plot_residual(source, path):
    """The std before each site by layer, a line for each model; one picture for each kind of token, spread as a band."""
    try:
        with open(source) as f:
            rows = [row for row in json.load(f)["rows"] if row["dataset"] == "residual"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f"error: {source} has no row of --dataset=residual ({type(e).__name__}): "
                 f"write it with `python eval.py --dataset=residual --json={source}`")
    if not rows:
        sys.exit(f"error: {source} has no row of --dataset=residual")
    kinds = [kind for kind in ("position_0", "eot", "others") if any(row["sites"]["ln_f"][kind] for row in rows)]
    sites = list(max((row["sites"] for row in rows), key=len))  # of the deepest model
    fig, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 5), layout="constrained", squeeze=False, sharey=True)
    for axis, kind in zip(axes[0], kinds):
        for row, color in zip(rows, plt.cm.tab10.colors * 9):
            found = [row["sites"].get(site, {}).get(kind) or {} for site in sites]
            mean, spread = (np.array([std.get(key, np.nan) for std in found], float) for key in ("mean", "spread"))
            label = f"{row['role'].replace('ln_free', 'LN-free')}: {row['source']}, sinks {row['sink_rate']:.1%}"
            axis.plot(sites, mean, "o-", color=color, markersize=3, label=label)
            axis.fill_between(sites, np.maximum(mean - spread, mean / 10), mean + spread, color=color, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(kind.replace("_", " "))
        every = -(-len(sites) // 16)
        axis.set_xticks(range(0, len(sites), every), sites[::every], rotation=90, fontsize=8)
    axes[0][0].set_ylabel("std before the site (band: spread over tokens)")
    axes[0][-1].legend(fontsize=7, loc="upper left")
    save(fig, path, "residual stream")


def save(fig, path, title):
    try:
        if os.path.lexists(path) and (os.path.islink(path) or title.encode() not in open(path, "rb").read()):
            sys.exit(f"error: {path} is there already and was not drawn by plot.py: move it away")
        fig.savefig(path, dpi=120, metadata=dict(Title=title))
    except OSError as e:
        sys.exit(f"error: can't write {path}: {e}")
    print(path)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__.strip() if sys.argv[1:] in (["--help"], ["-h"]) else "error: usage: python plot.py OUT_DIR, or a .json file of eval.py")
    if sys.argv[1].endswith(".json"):
        plot_residual(sys.argv[1], sys.argv[1].removesuffix(".json") + ".png")
    else:
        plot_loss(sys.argv[1].rstrip("/"), os.path.join(sys.argv[1], "loss.png"))
