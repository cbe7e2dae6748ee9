"""
Faults at length: what test_faults.py does a few times, as often as one likes.

    python tests/soak.py                # all of it: some 45 minutes on two cores
    python tests/soak.py kills --n=100  # one part: kills, ranks, launcher, preparations or fuzz

Each part ends in a line with its figure, or in an AssertionError. The random moments are those of --seed.
"""
import argparse
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCHEDULE = [("ln_2", 1, 2), ("ln_1qk", 9, 0), ("ln_1v", 10, 2), ("ln_f", 20, None), ("eot", 21, None),
            ("bos", 22, None)]
# a removal of 13 LayerNorms that saves at each step, so that many kills meet it while it saves
TRAIN = [os.path.join(REPO, "train.py"), f"--init_from={REPO}/assets/tiny", f"--ln_schedule={SCHEDULE}",
         "--dataset=text", "--batch_size=1", "--gradient_accumulation_steps=2", "--block_size=32", "--warmup_iters=2",
         "--eval_interval=1000", "--eval_iters=1", "--checkpoint_interval=1", "--log_interval=1", "--dtype=float32",
         "--dropout=0.1", "--compile=False"]
ENV = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=REPO)


def start(*args, stderr=subprocess.STDOUT):
    """A process whose output can be read while it runs."""
    command = [sys.executable, "-u", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENV)


def finish(*args):
    """A process that must not fail."""
    process = start(*args)
    text = process.communicate()[0]
    assert process.returncode == 0, text


def wait_for(process, words):
    """Read what it prints up to a line with these words; False: it ended before."""
    return any(words in line for line in process.stdout)


def write_text():
    """Tokens in data/text, of words by chance."""
    words = ["def read(self):\n", "    return self.buffer[:size]\n", "class Reader:\n", "import os\n"]
    Path("text.txt").write_text("".join(np.random.default_rng(0).choice(words, 5000)))
    finish(os.path.join(REPO, "prepare_owt.py"), "--dataset=text", "--files=text.txt")


def contents(folder="."):
    """{path below a folder: bytes} of its files; False for what is neither a file nor a folder."""
    paths = [path for path in Path(folder).rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in paths}


def removal(n, chance, what="a removal", launcher=(), says="", after=(0, 0.8), steps=6):
    """A removal of n times so many steps and 25 more is killed n times at random moments, or torchrun or one of its
    processes is; it ends within a minute. The same command takes it up again. In the end it is the same run as one that
    nothing disturbed: the same weights to the bit, each step once in the log, no temporary file."""
    steps = 25 + steps * n
    command = [*launcher, *TRAIN, f"--max_iters={steps}"]
    finish(*command, "--out_dir=out/whole", "--checkpoint_interval=1000")
    again = [*command, "--out_dir=out/killed", "--init_from=auto"]
    saving, seconds = 0, []
    for _ in range(n):
        process = start(*again)
        assert wait_for(process, "  loss "), "it ended before it could be killed"
        time.sleep(chance.uniform(*after))
        children = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
        os.kill(int(chance.choice(sum(children, []))) if what == "a rank" else process.pid, signal.SIGKILL)
        began = time.monotonic()
        text = process.communicate(timeout=60)[0]  # until its processes have closed it
        seconds.append(time.monotonic() - began)
        assert process.returncode != 0
        assert says in text, text
        saving += os.path.exists("out/killed/.ckpt.pt.unfinished")
    finish(*again)
    found, expected = contents("out/killed"), contents("out/whole")
    assert found["model/model.safetensors"] == expected["model/model.safetensors"]
    entries = [json.loads(line) for line in found["log.jsonl"].splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(steps))
    assert len([entry for entry in entries if "event" in entry]) == 15
    assert not [name for name in found if "unfinished" in name]
    return f"{n} kills of {what}, {saving} of them while it saved; all had ended within {max(seconds):.0f} s"


def preparations(n, chance):
    """A preparation of rows and text files is killed n times, at random moments."""
    words = np.random.default_rng(0).choice(["naïve ", "café\n", "read ", "size, ", "value\n"], (20_000, 200))
    documents = ["".join(row) for row in words]
    for i in range(10):
        Path(f"long{i}.txt").write_text("".join(documents[i::10]))
        Path(f"rows{i}.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents[i::10]))
    args = [os.path.join(REPO, "prepare_owt.py"), "--files=rows*.jsonl,long*.txt"]
    finish(*args, "--dataset=whole")
    resumed = 0
    for _ in range(n):
        process = start(*args, "--dataset=killed")
        while not os.path.exists("data/.killed.unfinished") and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
        resumed += len(glob.glob("data/.killed.unfinished/*.npy")) > 0
        shutil.rmtree("data/killed", ignore_errors=True)  # if it had finished
    finish(*args, "--dataset=killed")
    assert contents("data/killed") == contents("data/whole")
    assert sorted(os.listdir("data/killed")) == ["meta.json", "train.bin", "val.bin"]
    assert sorted(os.listdir("data")) == ["killed", "text", "whole"]
    return f"{n} kills of preparations, {resumed} of them with parts to continue from"


PARTS = dict(
    kills=(removal, 25),
    ranks=(partial(removal, what="a rank", launcher=TWO, says="exitcode  : -9"), 10),
    launcher=(partial(removal, what="torchrun", launcher=TWO, says="stopped at step", after=(0.5, 1), steps=20), 3),
    preparations=(preparations, 10),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "fuzz"], help="one of them; none: all")
    parser.add_argument("--n", type=int, help="how often")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, (part, n) in PARTS.items():
        if args.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                write_text()
                print(f"{name}: {part(args.n or n, random.Random(args.seed))}", flush=True)
                os.chdir(HERE)
    if args.part in (None, "fuzz"):
        env = os.environ | dict(FUZZ_INPUTS=str(args.n or 2000))
        sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-q", os.path.join(HERE, "test_fuzz.py")], env=env))


if __name__ == "__main__":
    main()
