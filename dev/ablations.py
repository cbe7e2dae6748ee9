"""
Find out what makes a removal better: many short runs on the testbed (`make testbed`).

    python -m dev.ablations                   # do all runs that the csv lacks; the same command continues
    python -m dev.ablations --only=kl,control # only runs whose names begin with these
    python -m dev.ablations --show            # print the csv as a table

Each run is train.py with some flags, then eval.py beside the original on two val sets from packages that no model was
trained on: choices are made on `testbed_choose`, results are reported on `testbed_report`. A line of dev/ablations.csv
has the commit, the flags, the seed and the results.
"""
import csv
import json
import os
import shlex
import subprocess
import sys
import time
from statistics import mean, stdev

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

from configurator import configure

# -----------------------------------------------------------------------------
only = ""  # the runs whose names begin with these, separated by commas; "": all
tokens = 150_000  # of each val set
path = "dev/ablations.csv"  # the results
show = False  # print the table, run nothing
picture = ""  # with --show, also draw the gap over tokens into this file
# -----------------------------------------------------------------------------

CONFIG = "config/remove_ln_testbed.py"
ORIGINAL = "out/testbed/model"
MEASURED = ("loss", "loss_se", "kl", "agree", "max")
NUMBERS = [f"{part}_{what}" for part in ("choose", "report") for what in MEASURED]
FIELDS = ["name", "steps", "seed", "commit", "flags", "seconds", *NUMBERS]

CONTROL = ["config/control.py"]
LEARN = ["--kl_share=0.5"]
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3")
METHODS = {  # flags, and learning rates on both sides of the best
    "recipe": ([], RATES[:4]),
    "control": (CONTROL, RATES[:4]),
    "kl 0.5": (LEARN, RATES[1:]),
    "control kl 0.5": ([*LEARN, *CONTROL], RATES[1:]),
}
# each method at its best rate on `choose`
CHOSEN = ("recipe lr 4e-4", "control lr 2e-4", "kl 0.5 lr 8e-4", "control kl 0.5 lr 8e-4")
STEPS = 300  # 1.2 M tokens

# the rows of the config
FIRST = [("ln_2", (0.03, 0.075), None), ("ln_1qk", (0.075, 0.12), None), ("ln_1v", (0.12, 0.19), None)]
LAST = [("ln_f", 0.195, None), ("eot", 0.21, None), ("bos", 0.24, None)]
ORDERS = {
    "down": [*((*row, "down") for row in FIRST), *LAST],
    "ln_f first": [
        ("ln_f", 0.03, None),
        ("ln_2", (0.04, 0.09), None),
        ("ln_1qk", (0.09, 0.14), None),
        ("ln_1v", (0.14, 0.19), None),
        *LAST[1:],
    ],
    "at once": [
        ("ln_2", 0.03, 0),
        ("ln_1qk", 0.03, 0),
        ("ln_1v", 0.03, 0),
        ("ln_f", 0.03, None),
        ("eot", 0.03, None),
        ("bos", 0.03, None),
    ],
    "bos and eot late": [*FIRST, LAST[0], ("eot", 0.5, None), ("bos", 0.6, None)],
    "slow": [
        ("ln_2", (0.05, 0.2), None),
        ("ln_1qk", (0.2, 0.35), None),
        ("ln_1v", (0.35, 0.55), None),
        ("ln_f", 0.55, None),
        ("eot", 0.6, None),
        ("bos", 0.65, None),
    ],
}


def settings_of_runs():
    """{name: flags of train.py}."""
    runs = {}
    for method, (flags, rates) in METHODS.items():
        for rate in rates:
            runs[f"{method} lr {rate}"] = [f"--learning_rate={rate}", *flags]
    at = "--learning_rate=4e-4"
    for share in ("0.8", "1"):
        runs[f"kl {share} lr 4e-4"] = [at, f"--kl_share={share}"]
    for beta2 in ("0.95", "0.999"):
        runs[f"beta2 {beta2}"] = [at, f"--beta2={beta2}"]
    for weight in ("0.1", "1"):
        runs[f"aux {weight}"] = [at, f"--aux_loss_weight={weight}"]
    runs["constant over all"] = [at, "--std_over=all"]
    runs["constant momentum 0.9"] = [at, "--std_momentum=0.9"]
    for order, ln_schedule in ORDERS.items():
        runs[f"order {order}"] = [at, f"--ln_schedule={ln_schedule}"]
    return runs


def all_runs():
    """[(name, steps, seed)]: every rate of each method; what was chosen by it with more seeds, and for fewer and
    more steps; what changes one thing of the recipe, at half the steps."""
    names = list(settings_of_runs())
    swept = [name for name in names if name.rpartition(" lr ")[0] in METHODS]
    runs = [(name, STEPS, 1) for name in swept]
    runs += [(name, STEPS, seed) for seed in (2, 3) for name in CHOSEN]
    runs += [(name, STEPS // 2, seed) for seed in (1, 2, 3) for name in CHOSEN[2:]]
    runs += [(name, steps, 1) for steps in (STEPS // 4, STEPS // 2, 2 * STEPS) for name in CHOSEN if name != CHOSEN[1]]
    runs += [(name, STEPS // 2, 1) for name in ("kl 0.5 lr 4e-4", *names[len(swept) :])]
    return list(dict.fromkeys(runs))


def done_already():
    """{(name, steps, seed): row} of the csv."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != FIELDS:
            raise UserError(f"{path} has other columns than the csv of ablations.py: choose another --path")
        return {(row["name"], int(row["steps"]), int(row["seed"])): row for row in reader}


def call(*command):
    """Run a script. UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        raise UserError(f"{shlex.join(command)} ended with {done.returncode}: {' '.join(last)}")


def run(name, steps, seed):
    """Train, evaluate, and append a line."""
    out_dir = f"out/ablations/{name.replace(' ', '_')}_{steps}_{seed}"
    flags = settings_of_runs()[name]
    settings = [f"--out_dir={out_dir}", *flags, f"--seed={seed}", f"--max_iters={steps}", "--force"]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
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
        numbers = {key: float(row[key]) for key in NUMBERS}
        groups.setdefault((name, n), {})[seed] = numbers
    found = []
    for (name, n), seeds_of in groups.items():
        mean_of = {key: mean(row[key] for row in seeds_of.values()) for key in NUMBERS}
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


def draw(rows, file):
    """The gap over tokens, of the recipe and of the best method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, color in ((CHOSEN[0], "tab:red"), (CHOSEN[2], "tab:green")):
        found = sorted((row for row in rows if row["name"] == name and row["gap"]), key=lambda row: row["steps"])
        at = [row["steps"] * 4096 / 1e6 for row in found]
        spread = [row["gap_sd"] or 0 for row in found]
        axis.errorbar(at, [row["gap"] for row in found], spread, fmt="o-", capsize=3, color=color, label=name)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0)
    ticks = sorted({row["steps"] * 4096 / 1e6 for row in rows})
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("million tokens of fine-tuning")
    axis.set_ylabel("gap to the best model with LN, nats per token")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    print(f"next: look at {file}")


def main():
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(tokens=1))
    if show:
        rows = means()
        print_means(rows)
        return draw(rows, picture) if picture else None
    if not os.path.isdir(ORIGINAL):
        raise UserError(f"{ORIGINAL} is not there: run `make testbed` first")
    chosen = [run for run in all_runs() if run[0].startswith(tuple(only.split(",")))]
    if not chosen:
        raise UserError(f"no run's name begins with {only!r}: there are {', '.join(settings_of_runs())}")
    failed = 0
    for name, steps, seed in chosen:
        if (name, steps, seed) not in done_already():
            try:
                run(name, steps, seed)
            except UserError as e:
                failed += 1
                print(f"{name}, {steps} steps, seed {seed}: {e}", flush=True)
    if failed:
        raise UserError(f"{failed} runs failed, see above; the others are in {path}")


if __name__ == "__main__":
    main()
