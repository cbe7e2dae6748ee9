"""
Pictures of a run and of a residual stream.

    python -m tools.plot out/remove_ln_tiny   # loss against step, with every removal event -> out/remove_ln_tiny/loss.png
    python -m tools.plot residual.json        # of eval.py --dataset=residual --json=residual.json -> residual.png

A run is drawn beside its control, out/remove_ln_tiny_control, where that is there.
"""
import io
import os
import sys

from parts.errors import UserError, begin_script, on_disk

if __name__ == "__main__":
    begin_script()  # before the slow imports

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configurator import take_source
from parts import jsonfile
from parts.data import token_word
from parts.files import run_settings, whole_file
from parts.run import log_entries

COLORS = dict(ln_2="tab:green", ln_1qk="tab:purple", ln_1v="tab:brown", ln_f="black", eot="tab:gray", bos="tab:gray")


# --- a run


def read_log(run):
    """{"loss": {step: train loss}, "val": {step: val loss}, "events": [(step, name)]} of a run's
    log.jsonl."""
    path = os.path.join(run, "log.jsonl")
    loss, val, events = {}, {}, []
    if not os.path.exists(path):
        raise UserError(f"{path} is not there: {run} is not the out_dir of a run")
    for _, entry in log_entries(path):
        step = entry["step"]
        if entry.get("loss") is not None:  # of a step that was not skipped
            loss[step] = entry["loss"]
        if entry.get("val_loss") is not None:
            val[step] = entry["val_loss"]
        if "event" in entry:
            events.append((step, entry["event"]))
    return dict(loss=loss, val=val, events=events)


def plot_run(run):
    free = read_log(run)
    if not free["loss"]:
        raise UserError(f"{run}/log.jsonl has no step yet")
    control = None
    if os.path.exists(run + "_control/log.jsonl"):
        control = read_log(run + "_control")
    fig, (top, low) = plt.subplots(2, 1, sharex=True, figsize=(13, 7), height_ratios=(3, 2), layout="constrained")
    draw_losses(top, free, control, unit_of(run))
    draw_gap(low, free, control)
    draw_events(top, low, free["events"])
    save(fig, os.path.join(run, "loss.png"), "loss of a run")
    if free["events"]:
        print(f"next: python -m tools.lens {run} --prompt=TEXT; python -m tools.export {run} --to=hf")


def unit_of(run):
    """byte or token, of the run's data set; token where that is gone."""
    dataset = run_settings(run).get("dataset", "")
    try:
        return token_word(dataset)
    except UserError:
        return "token"


def smoothed(values):
    """(n,) -> (n,): means over a window of about a 40th of them, narrower at the ends."""
    values = np.array(values)
    half = len(values) // 80
    sums = np.cumsum([0, *values])
    i = np.arange(len(values))
    first, end = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def draw_losses(axis, free, control, unit):
    """Every step's train loss, smoothed too, and the val loss."""
    for log, name, color in ((free, "LN-free", "tab:red"), (control, "control", "tab:blue")):
        if log is None:
            continue
        steps, losses = list(log["loss"].keys()), list(log["loss"].values())
        axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.6)
        axis.plot(steps, smoothed(losses), color=color, linewidth=1.2, label=f"{name}, smoothed")
        steps, losses = log["val"].keys(), log["val"].values()
        axis.plot(steps, losses, "o", color=color, label=f"{name}, val", markersize=5)
    axis.set_ylabel(f"loss, nats per {unit}")
    beside(axis)
    # an event can throw the loss far up for a step or two; the axis follows all but those
    losses = np.array([*free["loss"].values(), *free["val"].values(), *(control or free)["loss"].values()])
    axis.set_ylim(losses.min() - 0.02, min(losses.max(), np.quantile(losses, 0.99) + 0.1) + 0.02)
    if free["events"]:
        draw_spike(axis, free)


def draw_spike(axis, free):
    """What the last event threw the loss up to, as a number: it can be beyond the axis."""
    last, name = free["events"][-1]
    after = {step: loss for step, loss in free["loss"].items() if step >= last}
    if not after:
        return
    step = max(after, key=after.get)
    at = step, min(after[step], axis.get_ylim()[1])
    text = f"{after[step]:.2f} after {title_of(name)}"
    arrow = dict(arrowstyle="->", color="black", linewidth=0.8)
    axis.annotate(text, at, (12, -14), textcoords="offset points", fontsize=8, va="top", arrowprops=arrow)


def draw_gap(axis, free, control):
    """LN-free minus control, on the same batches."""
    if control:
        steps = sorted(free["loss"].keys() & control["loss"].keys())
    if control and steps:  # the control may have just begun
        gap = np.array([free["loss"][s] - control["loss"][s] for s in steps])
        axis.plot(steps, gap, color="tab:red", alpha=0.25, linewidth=0.6)
        axis.plot(steps, smoothed(gap), color="tab:red", linewidth=1.2, label="same batches, smoothed")
        steps = sorted(free["val"].keys() & control["val"].keys())
        val_gap = [free["val"][s] - control["val"][s] for s in steps]
        axis.plot(steps, val_gap, "o", color="black", markersize=4, label="val")
        axis.set_ylim(min(gap.min(), 0) - 0.005, np.quantile(gap, 0.97) * 1.2 + 0.01)
        beside(axis)
    axis.axhline(0, color="tab:blue", linewidth=0.8)
    axis.set_ylabel("LN-free minus control")
    axis.set_xlabel("step")


def beside(axis):
    """The legend, outside of the axis."""
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def title_of(name):
    """h.3.ln_2 -> ln_2; a treatment ends with its event."""
    kind = name.split(".")[-1].replace("$", r"\$")  # no formula
    return kind + " off" if kind in ("bos", "eot") else kind


def color_of(kind):
    return COLORS.get(kind.removesuffix(" off"), "black")


def draw_events(top, low, events):
    """A line at each step with an event, and above it the name of each kind's first."""
    first, number = {}, {}
    alpha = 0.5 if len(events) < 40 else 0.25
    for step, name in events:
        kind = title_of(name)
        first.setdefault(kind, step)
        number[kind] = number.get(kind, 0) + 1
        for axis in (top, low):
            axis.axvline(step, color=color_of(kind), linewidth=0.7, alpha=alpha, zorder=0)
    left, right = top.get_xlim()
    place = -np.inf  # of the last name: the next one stands beside it
    for kind, step in first.items():
        place = max(step, place + (right - left) / 70)
        text = kind if number[kind] == 1 else f"{kind} x {number[kind]}"
        where = dict(transform=top.get_xaxis_transform(), rotation=90, ha="center", va="bottom")
        top.text(place, 1.01, text, fontsize=8, color=color_of(kind), **where)


# --- a residual stream


def plot_residual(source):
    """The std before each site by layer, a line for each model; one picture for each kind of token."""
    rows = read_rows(source)
    sites = list(max((row["sites"] for row in rows), key=len))  # of the deepest model
    kinds = [kind for kind in ("position_0", "eot", "others") if any(row["sites"]["ln_f"].get(kind) for row in rows)]
    size = 5 * len(kinds), 5
    fig, axes = plt.subplots(1, len(kinds), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, kind in zip(axes[0], kinds):
        for i, (row, color) in enumerate(zip(rows, plt.cm.tab10.colors * 9)):
            found = [row["sites"].get(site, {}).get(kind) or {} for site in sites]
            mean = np.array([std.get("mean", np.nan) for std in found], float)
            spread = np.array([std.get("spread", np.nan) for std in found], float)
            name = f"{row['role'].replace('ln_free', 'LN-free')}: {row['source']}"
            label = name.replace("$", r"\$") + f", sinks {row['sink_rate']:.1%}"
            width = max(1, 5 - 2 * i)  # where lines coincide, the one below is wider
            axis.plot(sites, mean, "o-", color=color, markersize=3, linewidth=width, label=label)
            lower = np.maximum(mean - spread, mean / 10)  # the axis is logarithmic
            axis.fill_between(sites, lower, mean + spread, color=color, alpha=0.15, linewidth=0)
        axis.set_yscale("log")
        axis.set_title(kind.replace("_", " "))
        every = -(-len(sites) // 16)
        axis.set_xticks(range(0, len(sites), every), sites[::every], rotation=90, fontsize=8)
    axes[0][0].set_ylabel("std before the site (band: spread over tokens)")
    fig.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    save(fig, source.removesuffix(".json") + ".png", "residual stream")


def read_rows(source):
    advice = f"write it with `python eval.py --dataset=residual --json={source}`"
    rows = []
    for row in jsonfile.read(source, {"rows": list}, advice)["rows"]:
        if not isinstance(row, dict) or row.get("dataset") != "residual" or not row.get("sites"):
            continue
        jsonfile.check(source, row, dict(role=str, source=str, sink_rate=float, sites={"ln_f": dict}), advice)
        for site, kinds in row["sites"].items():
            jsonfile.check(f"{source}: {site[:40]}", row["sites"], {site: dict}, advice)
            for kind in ("position_0", "eot", "others"):
                jsonfile.check(f"{source}: {site[:40]}", kinds, {kind + "?": dict(mean=float, spread=float)}, advice)
        rows.append(row)
    if not rows:
        raise UserError(f"{source} has no row of --dataset=residual: {advice}")
    return rows


def check_picture(path, title):
    """UserError unless a picture can be written to path, in place of nothing but an earlier one of this
    title."""
    if not path.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"{path} does not end in .png, .pdf or .svg")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"can't write {path}: there is no directory {os.path.dirname(path)}")
    if os.path.lexists(path + ".tmp"):
        raise UserError(f"{path}.tmp is in the way: remove it")
    if os.path.islink(path):
        raise UserError(f"{path} is a link, and would be replaced: move it away")
    if os.path.exists(path):
        with on_disk(f"can't write {path}"), open(path, "rb") as f:
            if title.encode() not in f.read():
                raise UserError(f"{path} is there already and was not drawn by plot.py: move it away")


def save(fig, path, title):
    check_picture(path, title)
    picture = io.BytesIO()
    fig.savefig(picture, format=path[-3:], dpi=120, metadata=dict(Title=title))
    with whole_file(path) as f:
        f.write(picture.getvalue())
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
