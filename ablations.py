"""
What makes a removal better: every run of a table on the testbed (`make testbed`), one after another.

    python ablations.py                   # all that is not in the csv yet; stop it and start it as you like
    python ablations.py --only=kl,control # the runs whose names begin so
    python ablations.py --show            # the csv as a table

Each run is train.py with some flags, and eval.py beside the original on two val sets of packages that no
model was trained on: choices are made on `testbed_choose`, and what is reported is on `testbed_report`. A
line of ablations.csv has the commit, the flags, the seed, and what was measured.
"""
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from statistics import mean, stdev

from configurator import configure
from parts.errors import UserError

# -----------------------------------------------------------------------------
only = ""  # beginnings of names, with commas between; "": all runs
seeds = 1  # >= 1: of each run: 1, 2, ...
steps = 300  # >= 1: of each run, as max_iters
tokens = 150_000  # >= 1: of each val set
path = "ablations.csv"  # what was measured
show = False  # only print the table
# -----------------------------------------------------------------------------

CONFIG = "config/remove_ln_testbed.py"
ORIGINAL = "out/testbed/model"
CONTROL = ["config/control.py"]
MEASURED = ("loss", "loss_se", "kl", "agree", "max")
FIELDS = ["name", "steps", "seed", "commit", "flags", "seconds"]
FIELDS += [f"{part}_{what}" for part in ("choose", "report") for what in MEASURED]


def all_runs():
    """{name: flags of train.py}."""
    runs = {}
    for rate in ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3"):
        at = [f"--learning_rate={rate}"]
        runs[f"recipe lr {rate}"] = at
        runs[f"control lr {rate}"] = [*CONTROL, *at]
        for share in ("0.5", "0.8", "1"):
            runs[f"kl {share} lr {rate}"] = [*at, f"--kl_share={share}"]
            runs[f"control kl {share} lr {rate}"] = [*CONTROL, *at, f"--kl_share={share}"]
    rate = "--learning_rate=4e-4"
    for muon_rate in ("2e-4", "4e-4", "8e-4", "1.6e-3"):
        runs[f"muon lr {muon_rate}"] = [f"--learning_rate={muon_rate}", "--muon=True"]
    runs["constant harmonic"] = [rate, "--std_mean=harmonic"]
    runs["constant squares"] = [rate, "--std_mean=squares"]
    runs["constant over all"] = [rate, "--std_over=all"]
    runs["constant momentum 0.9"] = [rate, "--std_momentum=0.9"]
    for weight in ("0.1", "1", "10"):
        runs[f"kl 0.5 hidden {weight}"] = [rate, "--kl_share=0.5", f"--hidden_weight={weight}"]
    runs["control kl 0.5 hidden 1"] = [*CONTROL, rate, "--kl_share=0.5", "--hidden_weight=1"]
    for temperature in ("2", "0.5"):
        runs[f"kl 0.5 temperature {temperature}"] = [rate, "--kl_share=0.5", f"--temperature={temperature}"]
    for near in ("0.003", "0.01"):
        runs[f"kl 0.5 adaptive {near}"] = ["--learning_rate=8e-4", "--kl_share=0.5", f"--adaptive={near}"]
    runs["refit"] = [rate, "--event_start=refit"]
    runs["taper 10"] = [rate, "--taper=10"]
    runs["taper 30"] = [rate, "--taper=30"]
    runs["beta2 0.95"] = [rate, "--beta2=0.95"]
    runs["beta2 0.999"] = [rate, "--beta2=0.999"]
    runs["aux 0.1"] = [rate, "--aux_loss_weight=0.1"]
    runs["aux 1"] = [rate, "--aux_loss_weight=1"]
    ends = [("ln_f", 0.195, None), ("eot", 0.21, None), ("bos", 0.24, None)]
    for name, schedule in {
        "down": [("ln_2", (0.03, 0.075), None, "down"), ("ln_1qk", (0.075, 0.12), None, "down"),
                 ("ln_1v", (0.12, 0.19), None, "down"), *ends],
        "attention first": [("ln_1qk", (0.03, 0.075), None), ("ln_1v", (0.075, 0.12), None),
                            ("ln_2", (0.12, 0.19), None), *ends],
        "ln_f first": [("ln_f", 0.03, None), ("ln_2", (0.04, 0.09), None), ("ln_1qk", (0.09, 0.14), None),
                       ("ln_1v", (0.14, 0.19), None), *ends[1:]],
        "at once": [("ln_2", 0.03, 0), ("ln_1qk", 0.03, 0), ("ln_1v", 0.03, 0), ("ln_f", 0.03, None),
                    ("eot", 0.03, None), ("bos", 0.03, None)],
        "bos and eot late": [*[("ln_2", (0.03, 0.075), None), ("ln_1qk", (0.075, 0.12), None),
                               ("ln_1v", (0.12, 0.19), None)], ends[0], ("eot", 0.5, None), ("bos", 0.6, None)],
        "slow": [("ln_2", (0.05, 0.2), None), ("ln_1qk", (0.2, 0.35), None), ("ln_1v", (0.35, 0.55), None),
                 ("ln_f", 0.55, None), ("eot", 0.6, None), ("bos", 0.65, None)],
    }.items():
        runs[f"order {name}"] = [rate, f"--ln_schedule={schedule}"]
    taught = "--teacher=out/ablations/control_lr_2e-4_{steps}_{seed}_control/model"
    runs["kl 0.5 to control"] = ["--learning_rate=4e-4", "--kl_share=0.5", taught]
    return runs


def done_already():
    """{(name, steps, seed): row} of the csv."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return {(row["name"], int(row["steps"]), int(row["seed"])): row for row in csv.DictReader(f)}


def call(*command):
    """UserError, with the last line that it printed, if a script fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise UserError(f"{shlex.join(command)} ended with {done.returncode}: {' '.join(last)}")


def run(name, flags, seed):
    """Train, evaluate, and append a line."""
    out_dir = f"out/ablations/{name.replace(' ', '_')}_{steps}_{seed}"
    flags = [flag.replace("{steps}", str(steps)).replace("{seed}", str(seed)) for flag in flags]
    settings = [f"--out_dir={out_dir}", *flags, f"--seed={seed}", f"--max_iters={steps}", "--force"]
    began = time.monotonic()
    call("train.py", CONFIG, *settings)
    seconds = time.monotonic() - began
    if CONTROL[0] in flags:
        out_dir += "_control"
    result = f"{out_dir}/eval.json"
    val = ["--dataset=testbed_choose,testbed_report", f"--tokens={tokens}"]
    call("eval.py", f"--models={ORIGINAL},{out_dir}", f"--json={result}", *val)
    with open(result) as f:
        rows = json.load(f)["rows"]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    line = dict(name=name, steps=steps, seed=seed, commit=git.stdout.strip(), flags=shlex.join(flags))
    line["seconds"] = round(seconds)
    for row in rows:
        part = row["dataset"].removeprefix("testbed_")
        if row["source"] == out_dir:
            line |= {f"{part}_{what}": row.get(what) for what in MEASURED}
    new = not os.path.exists(path)
    with open(path, "a") as f:
        writer = csv.DictWriter(f, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(line)
    found = f"loss {line['choose_loss']:.4f}  KL {line['choose_kl']:.4f}"
    print(f"{name:<28} seed {seed}  {seconds:>5.0f} s  {found}", flush=True)


def means():
    """The csv's rows of a name and a number of steps in one: [{"name", "steps", "seeds", "gap", "gap_sd", ...}],
    the lowest loss on `choose` first. The gap is on `report`, to the model with LN that has the lowest loss on
    `choose` at as many steps, over the seeds that both have."""
    groups = {}
    for (name, n, seed), row in done_already().items():
        numbers = {key: float(row[key]) for key in FIELDS[6:]}
        groups.setdefault((name, n), {})[seed] = numbers
    found = []
    for (name, n), seeds_of in groups.items():
        mean_of = {key: mean(row[key] for row in seeds_of.values()) for key in FIELDS[6:]}
        found.append(dict(name=name, steps=n, seeds=seeds_of, **mean_of))
    found.sort(key=lambda row: row["choose_loss"])
    for row in found:
        best = next((r for r in found if r["name"].startswith("control") and r["steps"] == row["steps"]), None)
        both = row["seeds"].keys() & best["seeds"].keys() if best else ()
        gaps = [row["seeds"][seed]["report_loss"] - best["seeds"][seed]["report_loss"] for seed in both]
        row["gap"] = mean(gaps) if gaps else None
        row["gap_sd"] = stdev(gaps) if len(gaps) > 1 else None
    return found


def print_means(rows):
    """± is the standard deviation over seeds."""
    print(f"{'':<24}{'steps':>6}{'seeds':>6}{'choose':>8}{'report':>8}{'KL':>7}{'max':>6}{'gap':>8}{'±':>7}")
    for row in rows:
        line = f"{row['name']:<24}{row['steps']:>6}{len(row['seeds']):>6}{row['choose_loss']:>8.4f}"
        line += f"{row['report_loss']:>8.4f}{row['report_kl']:>7.4f}{row['report_max']:>6.1f}"
        line += "" if row["gap"] is None else f"{row['gap']:>+8.4f}"
        line += "" if row["gap_sd"] is None else f"{row['gap_sd']:>7.4f}"
        print(line)


def main():
    configure(globals(), sys.argv[1:], __doc__)
    if show:
        return print_means(means())
    if not os.path.isdir(ORIGINAL):
        raise UserError(f"{ORIGINAL} is not there: run `make testbed` first")
    beginnings = tuple(only.split(","))
    for seed in range(1, seeds + 1):
        for name, flags in all_runs().items():
            if name.startswith(beginnings) and (name, steps, seed) not in done_already():
                run(name, flags, seed)


if __name__ == "__main__":
    main()
