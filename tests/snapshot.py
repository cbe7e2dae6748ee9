"""
What a checkout computes, as one sha256 a line: to see that a change of the code's form changed no number.

    python tests/snapshot.py REPO FOLDER > list      # runs REPO's scripts below FOLDER
    diff before after

Trained weights and logs, a table's JSON, the token files of every kind of source, and the exports. The losses of two
processes, which no two runs add up in one order, are printed to five digits instead. About six minutes on two cores.
"""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import conftest  # noqa: E402  (sets HF_HUB_OFFLINE)
from tiny_hub import serve  # noqa: E402

repo, folder = (os.path.abspath(path) for path in sys.argv[1:])
os.makedirs(folder)
os.chdir(folder)
env = dict(os.environ, PYTHONPATH=repo, HF_HOME=os.path.join(folder, "cache"), OMP_NUM_THREADS="2")


def python(*args):
    """A script of REPO, or other Python; it must not fail."""
    args = [f"{repo}/{arg}" if arg.endswith(".py") else arg for arg in args]
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def show(name, content):
    print(hashlib.sha256(content).hexdigest(), name, flush=True)


def show_files(below):
    for path in sorted(Path(below).rglob("*")):
        if path.suffix in (".bin", ".safetensors", ".json") and path.name not in ("settings.json", "table.json"):
            show(path, path.read_bytes())


def read_log(run):
    """The entries of its log.jsonl without what depends on the machine's speed."""
    entries = conftest.read_log(run)
    return [{key: value for key, value in e.items() if key not in ("tokens_per_s", "mfu")} for e in entries]


# token files: the standard library, text files few and many and large, rows of text and of ids, a hub's layouts
conftest.cache_gpt2_tokenizer(env, os.path.join(folder, "tiktoken"))
rng = np.random.default_rng(0)
source = Path(json.__file__).read_text()
docs = [source[i : i + n] for i, n in zip(rng.integers(0, 5000, 2500), rng.integers(1, 3000, 2500))]
docs[7] = ""
os.makedirs("text")
for i, doc in enumerate(docs[:100]):
    Path(f"text/{i}.txt").write_text(doc)
Path("large.txt").write_text("\n".join(docs))
Path("rows.jsonl").write_text("".join(json.dumps(dict(text=doc)) + "\n" for doc in docs))
pq.write_table(pa.table(dict(text=docs, body=docs[::-1])), "rows.parquet", row_group_size=500)
pq.write_table(pa.table(dict(input_ids=[[i, i + 1, 50256, 7] for i in range(4000)])), "ids.parquet")
for flags in (
    "",
    "--dataset=few --files=text/1.txt,text/2.txt",
    "--dataset=many --files=text/*.txt --tokenizer=gpt2",
    "--dataset=large --files=large.txt --tokenizer=gpt2",
    "--dataset=jsonl --files=rows.jsonl --tokenizer=gpt2",
    "--dataset=parquet --files=rows.parquet,text/1.txt --column=body --val_every=3",
    "--dataset=some --files=rows.parquet --tokens=300_000",
    "--dataset=own --files=ids.parquet --tokenizer=60000:5",
):
    python("prepare_owt.py", *flags.split())
os.makedirs("hub/owt/refs-convert-parquet/plain_text/partial-train")
os.makedirs("hub/stories/data")
os.link("rows.parquet", "hub/owt/refs-convert-parquet/plain_text/partial-train/0000.parquet")
os.link("rows.parquet", "hub/stories/data/train-0.parquet")
os.link("ids.parquet", "hub/stories/data/test-0.parquet")
with serve({"datasets/Skylion007/openwebtext": Path("hub/owt"), "datasets/org/stories": Path("hub/stories")}) as hub:
    env |= hub.env
    python("prepare_owt.py", "--dataset=owt", "--tokens=1_000_000")
    python("prepare_owt.py", "--dataset=org/stories")
show_files("data")

# a removal and its control, and what is made of them
configs = ["train.py", "config/remove_ln_tiny.py"]
flags = [f"--init_from={repo}/assets/tiny", "--max_iters=100", "--lr_decay_iters=100", "--eval_interval=50"]
for name, *more in (
    ["float32", "--dtype=float32"],
    ["bfloat16", "--dtype=bfloat16"],
    ["extras", "--dtype=float32", "--max_iters=90", "--aux_loss_weight=0.1", "--dropout=0.1",
     "--gradient_checkpointing", "--gradient_accumulation_steps=2", "--batch_size=4"],
):
    python(*configs, *flags, f"--out_dir=out/{name}", *more)
    show(f"out/{name}/log.jsonl", json.dumps(read_log(f"out/{name}")).encode())
python(*configs, "config/control.py", *flags, "--dtype=float32", "--out_dir=out/float32_control")
python("train.py", "--init_from=scratch", "--n_layer=2", "--n_head=2", "--n_embd=32", "--max_iters=20",
       "--compile=False", "--dtype=float32", "--bias=False", "--out_dir=out/scratch")
models = f"--models={repo}/assets/tiny,out/float32_control,out/float32"
python("eval.py", models, "--dataset=stdlib,residual", "--tokens=50_000", "--json=out/table.json")
table = conftest.read_json("out/table.json")
del table["command"]
show("out/table.json", json.dumps(table, sort_keys=True).replace(repo, "REPO").encode())
for to, *more in (["hf"], ["folded"], ["hf", "--dtype=bfloat16"]):
    python("-m", "tools.export", "out/float32", f"--to={to}", f"--out=out/export_{to}_{len(more)}", *more)
show_files("out")
LOGITS = """import torch; from model import GPT; from tools.export import to_bridge; torch.set_grad_enabled(False)
print(to_bridge(GPT.from_pretrained("out/float32/model").eval())(torch.arange(200)[None]).numpy().tobytes().hex())"""
show("logits of the TransformerBridge", python("-c", LOGITS).split()[-1].encode())

env["OMP_NUM_THREADS"] = "1"
python("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *configs, *flags, "--dtype=float32",
       "--out_dir=out/two", "--batch_size=8", "--gradient_accumulation_steps=2")
for entry in read_log("out/two"):
    print(*(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items()))
