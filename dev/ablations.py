"""
Find out what makes a removal better: many short runs on the testbed (`make testbed`).

    python -m dev.ablations                   # do all runs that the csv lacks; the same command continues
    python -m dev.ablations --only=kl,control # only runs whose names begin with these
    python -m dev.ablations --show            # print the csv as tables, one for each text

Each run is train.py with some flags. Then it is measured beside the original on the five texts of dev/tails.py, from
packages that no model was trained on: choices are made on `choose`, results are reported on `report`. A line of
dev/ablations.csv has the commit, the flags, the seed and the figures of one text.
"""
import os
import shlex
import subprocess
import sys
import time

from parts.errors import UserError, begin_script, reading

if __name__ == "__main__":
    begin_script()  # before the slow imports

import pandas as pd  # datasets brings it

from configurator import configure
from dev.tails import tails
from model import GPT

# -----------------------------------------------------------------------------
only = ""  # the runs whose names begin with these, separated by commas; "": all
model = "testbed"  # the original is out/MODEL/model
tokens = 50_000  # tokens of a text to measure on
path = "dev/ablations.csv"  # the results
show = False  # print the tables, run nothing
# -----------------------------------------------------------------------------

CONFIG = "config/remove_ln_testbed.py"
DATASET = "testbed_seen"  # the config's
FIGURES = ["loss", "kl", "p99_9", "max", "far", "norm"]
FIELDS = ["model", "dataset", "name", "steps", "seed", "commit", "flags", "seconds", "text", *FIGURES]

CONTROL, FAITHFUL = "config/control.py", "config/faithful.py"
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3")
METHODS = {  # flags, and learning rates on both sides of the best
    "recipe": ([], RATES),
    "control": ([CONTROL], RATES[:4]),
    "kl 0.5": (["--kl_share=0.5"], RATES[1:]),
    "control kl 0.5": ([CONTROL, "--kl_share=0.5"], RATES[1:]),
    "faithful": ([FAITHFUL], RATES[2:]),
    "control faithful": ([FAITHFUL, CONTROL], RATES[2:]),
    "faithful without noise": ([FAITHFUL, "--noise_share=0"], RATES[3:4]),
    "faithful without streams": ([FAITHFUL, "--hidden_weight=0"], RATES[3:4]),
}
# each method at the rate that was best on `choose` after all of testbed_tune; faithful at that of `kl 0.5`
CHOSEN = ("recipe lr 4e-4", "control lr 2e-4", "kl 0.5 lr 8e-4", "control kl 0.5 lr 8e-4", "faithful lr 8e-4",
          "control faithful lr 8e-4")
STEPS = 300  # 1.2 M tokens


def settings_of_runs():
    """{name: flags of train.py; config files come first}."""
    return {f"{method} lr {rate}": [*flags, f"--learning_rate={rate}"]
            for method, (flags, rates) in METHODS.items() for rate in rates}


def all_runs():
    """[(name, steps, seed)]: what was chosen with three seeds, then every rate of each method, then longer runs."""
    runs = [(name, STEPS, seed) for seed in (1, 2, 3) for name in CHOSEN]
    runs += [(name, STEPS, 1) for name in settings_of_runs()]
    runs += [(name, n * STEPS, 1) for n in (2, 4) for name in ("faithful lr 8e-4", "control kl 0.5 lr 8e-4")]
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
    """Train, measure, and append lines: also the original's, once."""
    original, out_dir = f"out/{model}", f"out/ablations/{model}_{name.replace(' ', '_')}_{steps}_{seed}"
    flags = settings_of_runs()[name]
    began = time.monotonic()
    call("train.py", CONFIG, *flags, f"--init_from={original}/model", f"--out_dir={out_dir}", f"--seed={seed}",
         f"--max_iters={steps}", "--force")
    seconds = round(time.monotonic() - began)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    of_run = dict(name=name, steps=steps, seed=seed, commit=git.stdout.strip(), flags=shlex.join(flags),
                  seconds=seconds)
    lines = {folder: dict(model=model, dataset=DATASET) | line
             for folder, line in ((original, dict(name="original", steps=0, seed=0)), (out_dir, of_run))}
    models = {folder: GPT.from_pretrained(f"{folder}/model").eval() for folder in lines}
    measured = [lines[folder] | dict(text=f"{part} {text}") | figures for part in ("choose", "report")
                for (folder, text), figures in tails(models, original, part, tokens).items()]
    csv = pd.concat([results(), pd.DataFrame(measured, columns=FIELDS)])
    csv.drop_duplicates(["model", "dataset", "name", "steps", "seed", "text"]).to_csv(path, index=False)
    print(f"{name}, {steps} steps, seed {seed}: {seconds} s", flush=True)


def print_means():
    """For each model, dataset and text, means over seeds of a name and a number of steps, in ascending order of their
    loss on `choose`. The gap is to the model with LN that has the lowest loss on `choose` at as many steps, over the
    seeds that both have; ± is its standard deviation over seeds."""
    for (of, dataset), table in results().groupby(["model", "dataset"]):
        chosen = table[table.text == "choose text"].groupby(["name", "steps"]).loss.mean().sort_values()
        best = {steps: (name, steps) for name, steps in reversed(chosen.index) if name.startswith("control")}
        for text, runs in table.groupby("text", sort=False):
            title = f"{of}, {dataset}: {text}"
            print(f"\n{title:<48}steps seeds    loss      KL 99.9 %    max   > 50     norm      gap      ±")
            runs = {key: rows.set_index("seed") for key, rows in runs.groupby(["name", "steps"])}
            for name, steps in chosen.index:
                if (name, steps) in runs:
                    rows = runs[name, steps]
                    mean = rows[FIGURES].mean()
                    line = (f"{name:<48}{steps:>5}{len(rows):>6}{mean.loss:>8.4f}{mean.kl:>8.4f}{mean.p99_9:>7.2f}"
                            f"{mean['max']:>7.1f}{mean.far:>7.0f}{mean.norm:>9.1f}")
                    gaps = (rows.loss - runs[best[steps]].loss).dropna() if best.get(steps) in runs else ()
                    line += f"{gaps.mean():>+9.4f}" if len(gaps) else ""
                    line += f"{gaps.std():>7.4f}" if len(gaps) > 1 else ""
                    print(line.replace("nan", "   ").rstrip())  # figures that older runs don't have


def main():
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(tokens=1))
    if show:
        return print_means()
    if not os.path.isdir(f"out/{model}/model"):
        raise UserError(f"out/{model}/model is not there: run `make testbed` first")
    chosen = [run for run in all_runs() if run[0].startswith(tuple(only.split(",")))]
    if not chosen:
        raise UserError(f"no run's name begins with {only!r}: there are {', '.join(settings_of_runs())}")
    for key in chosen:
        done = results()
        done = done[(done.model == model) & (done.dataset == DATASET)]
        if key not in set(done[["name", "steps", "seed"]].itertuples(index=False, name=None)):
            run(*key)


if __name__ == "__main__":
    main()
