"""
Find out what makes a removal better: many short runs on the testbed (`make testbed`).

    python -m dev.ablations                   # do all runs that the csv lacks; the same command continues
    python -m dev.ablations --only=kl,control # only runs whose names begin with these
    python -m dev.ablations --show            # print the csv as a table

Each run is train.py with some flags, then eval.py beside the original on two val sets from packages that no model was
trained on: choices are made on `testbed_choose`, results are reported on `testbed_report`. A line of dev/ablations.csv
has the commit, the flags, the seed and the results.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from itertools import pairwise

from parts.errors import UserError, begin_script, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import pandas as pd  # datasets brings it

from configurator import configure

# -----------------------------------------------------------------------------
only = ""  # the runs whose names begin with these, separated by commas; "": all
tokens = 150_000  # tokens to evaluate on in each val set
path = "dev/ablations.csv"  # the results
show = False  # print the table, run nothing
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


def rows(*bounds, ln_f, eot, bos):
    """A schedule: ln_2, ln_1qk and ln_1v between neighbouring bounds, then ln_f and the treatments."""
    spread = [(kind, span, None) for kind, span in zip(("ln_2", "ln_1qk", "ln_1v"), pairwise(bounds))]
    return [*spread, ("ln_f", ln_f, None), ("eot", eot, None), ("bos", bos, None)]


RECIPE = rows(0.03, 0.075, 0.12, 0.19, ln_f=0.195, eot=0.21, bos=0.24)  # the config's
AT_ONCE = [(kind, 0.03, 0 if kind in ("ln_2", "ln_1qk", "ln_1v") else None) for kind, *_ in RECIPE]
SLOW = rows(0.05, 0.2, 0.35, 0.55, ln_f=0.55, eot=0.6, bos=0.65)
CHANGES = {  # each changes one thing in the recipe
    "kl 0.8 lr 4e-4": "--kl_share=0.8",
    "kl 1 lr 4e-4": "--kl_share=1",
    "beta2 0.999": "--beta2=0.999",
    "aux 1": "--aux_loss_weight=1",
    "order at once": f"--ln_schedule={AT_ONCE}",
    "order slow": f"--ln_schedule={SLOW}",
}


def settings_of_runs():
    """{name: flags of train.py}."""
    swept = {f"{method} lr {rate}": [f"--learning_rate={rate}", *flags]
             for method, (flags, rates) in METHODS.items() for rate in rates}
    return swept | {name: ["--learning_rate=4e-4", flag] for name, flag in CHANGES.items()}


def all_runs():
    """[(name, steps, seed)]: every rate of each method; what was chosen by it with more seeds, and for fewer and
    more steps; what changes one thing of the recipe, at half the steps."""
    runs = [(name, STEPS, 1) for name in settings_of_runs() if name not in CHANGES]
    runs += [(name, STEPS, seed) for seed in (2, 3) for name in CHOSEN]
    runs += [(name, STEPS // 2, seed) for seed in (1, 2, 3) for name in CHOSEN[2:]]
    runs += [(name, steps, 1) for steps in (STEPS // 4, STEPS // 2) for name in CHOSEN if name != CHOSEN[1]]
    runs += [(name, STEPS // 2, 1) for name in ("kl 0.5 lr 4e-4", *CHANGES)]
    return list(dict.fromkeys(runs))


def results():
    """The csv, as a table."""
    with reading(path):
        return pd.read_csv(path) if os.path.exists(path) else pd.DataFrame(columns=FIELDS)


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
    began = time.monotonic()
    call("train.py", CONFIG, f"--out_dir={out_dir}", *flags, f"--seed={seed}", f"--max_iters={steps}", "--force")
    seconds = round(time.monotonic() - began)
    if CONTROL[0] in flags:
        out_dir += "_control"
    val = ["--dataset=testbed_choose,testbed_report", f"--tokens={tokens}"]
    call("eval.py", f"--models={ORIGINAL},{out_dir}", f"--json={out_dir}/eval.json", *val)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    line = dict(name=name, steps=steps, seed=seed, commit=git.stdout.strip(), flags=shlex.join(flags), seconds=seconds)
    with open(f"{out_dir}/eval.json") as f:
        for row in json.load(f)["rows"]:
            if row["source"] == out_dir:
                part = row["dataset"].removeprefix("testbed_")
                line |= {f"{part}_{number}": row[number] for number in MEASURED}
    pd.DataFrame([line], columns=FIELDS).to_csv(path, mode="a", header=not os.path.exists(path), index=False)
    print(f"{name}, {steps} steps, seed {seed}: loss {line['choose_loss']:.4f}, {seconds} s", flush=True)


def print_means():
    """The means over seeds of a name and a number of steps, the lowest loss on `choose` first. The gap, on `report`, is
    to the model with LN that has the lowest loss on `choose` at as many steps, over the seeds that both have; ± is its
    standard deviation over seeds."""
    groups = [(*key, runs.set_index("seed")) for key, runs in results().groupby(["name", "steps"])]
    groups.sort(key=lambda group: group[2].choose_loss.mean())
    print(f"{'':<24}{'steps':>6}{'seeds':>6}{'choose':>8}{'report':>8}{'KL':>7}{'max':>6}{'gap':>8}{'±':>7}")
    for name, steps, runs in groups:
        mean = runs[NUMBERS].mean()
        line = f"{name:<24}{steps:>6}{len(runs):>6}{mean.choose_loss:>8.4f}"
        line += f"{mean.report_loss:>8.4f}{mean.report_kl:>7.4f}{mean.report_max:>6.1f}"
        with_ln = [other for n, k, other in groups if n.startswith("control") and k == steps]
        gaps = (runs.report_loss - with_ln[0].report_loss).dropna() if with_ln else ()
        line += f"{gaps.mean():>+8.4f}" if len(gaps) else ""
        print(line + (f"{gaps.std():>7.4f}" if len(gaps) > 1 else ""))


def main():
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(tokens=1))
    if show:
        return print_means()
    if not os.path.isdir(ORIGINAL):
        raise UserError(f"{ORIGINAL} is not there: run `make testbed` first")
    chosen = [run for run in all_runs() if run[0].startswith(tuple(only.split(",")))]
    if not chosen:
        raise UserError(f"no run's name begins with {only!r}: there are {', '.join(settings_of_runs())}")
    done = set(results()[["name", "steps", "seed"]].itertuples(index=False, name=None))
    for key in chosen:
        if key not in done:
            run(*key)


if __name__ == "__main__":
    main()
