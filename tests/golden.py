"""
The losses of the demo's first 30 steps, in float32, on the text that soak.py writes: tests/golden.json, for
test_faults.py to compare with.

    python tests/golden.py > tests/golden.json    # after a change that is meant to change them
"""
import json
import os
import subprocess
import sys
import tempfile
import time

import soak

STEPS = 30  # ln_2 goes in all layers, and ln_1qk in the first


def losses(*flags):
    """In the working folder, where soak.write_text has been."""
    config = os.path.join(soak.REPO, "config/remove_ln_tiny.py")
    flags = [f"--init_from={soak.REPO}/assets/tiny", "--dataset=text", "--dtype=float32", "--eval_iters=1", *flags]
    command = [sys.executable, os.path.join(soak.REPO, "train.py"), config, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    found = []
    while len(found) < STEPS and process.poll() is None:
        time.sleep(0.5)
        if os.path.exists("out/remove_ln_tiny/log.jsonl"):
            with open("out/remove_ln_tiny/log.jsonl") as f:
                entries = [json.loads(line) for line in f if line.endswith("\n")]
            found = [entry["loss"] for entry in entries if "loss" in entry]
    process.kill()
    process.wait()
    return found[:STEPS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        soak.write_text()
        print(json.dumps(losses()))
