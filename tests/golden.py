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

import soak
from conftest import REPO, TINY, read_log

STEPS = 30  # ln_2, ln_1qk and ln_1v go in all layers


def losses():
    """In the working folder, where soak.write_text has been."""
    flags = [f"--init_from={TINY}", "--dataset=text", "--dtype=float32", "--eval_iters=1", "--log_interval=1"]
    command = [sys.executable, f"{REPO}/train.py", f"{REPO}/config/remove_ln_tiny.py", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(f"step {STEPS:6}  "):
                process.terminate()
    return read_log("out/remove_ln_tiny", "loss")[:STEPS]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        soak.write_text()
        print(json.dumps(losses()))
