"""
tests/golden.json: the losses of the demo's first 30 steps, in float32, on the text that soak.py writes. Until step 30
ln_2, ln_1qk and ln_1v go in all layers.

    python tests/golden.py > tests/golden.json    # after a change that is meant to change them
"""
import json
import os
import tempfile

import soak
from conftest import REPO, TINY, read_log


def losses():
    """In the working folder, where soak.write_text has been."""
    flags = [f"--init_from={TINY}", "--dataset=text", "--dtype=float32", "--eval_iters=1", "--log_interval=1"]
    process = soak.start(f"{REPO}/train.py", f"{REPO}/config/remove_ln_tiny.py", *flags)
    soak.wait_for(process, "step     30  loss")
    process.terminate()
    process.communicate()
    return read_log("out/remove_ln_tiny", "loss")[:30]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        soak.write_text()
        print(json.dumps(losses()))
