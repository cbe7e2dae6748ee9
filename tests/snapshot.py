"""
What a checkout computes, as one sha256 a line: to see that a change of the code's form changed no number.

    python tests/snapshot.py REPO FOLDER > list      # runs REPO's scripts below FOLDER
    diff before after

Trained weights and logs (float32, bfloat16, with the control), a table's JSON, the token files of every kind
of source, and the exports. The losses of two processes, which no two runs add up in one order, are printed to
five digits instead. It takes about six minutes on two cores.
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

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import conftest  # noqa: E402  (sets HF_HUB_OFFLINE)
from tiny_hub import serve  # noqa: E402

repo, folder = (os.path.abspath(path) for path in sys.argv[1:])
os.makedirs(folder)
os.chdir(folder)
env = dict(os.environ, PYTHONPATH=repo, HF_HOME=os.path.join(folder, "cache"), OMP_NUM_THREADS="2")


def script(name, *args, launcher=()):
    tool = os.path.join(repo, "tools", name + ".py")
    path = [os.path.join(repo, name)]
    if not name.endswith(".py"):  # a tool, at the top before it was moved
        path = ["-m", f"tools.{name}"] if os.path.exists(tool) else [os.path.join(repo, name + ".py")]
    command = [sys.executable, *launcher, *path, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def show(name, content):
    print(hashlib.sha256(content).hexdigest(), name, flush=True)


def show_files(below):
    for path, _, names in sorted(os.walk(below)):
        for name in sorted(names):
            if name in ("settings.json", "table.json"):
                continue
            if name.endswith((".bin", ".safetensors", ".json")):
                with open(os.path.join(path, name), "rb") as f:
                    show(os.path.join(path, name), f.read())


def show_log(run):
    with open(f"{run}/log.jsonl") as f:
        entries = [json.loads(line) for line in f]
    for entry in entries:
        entry.pop("tokens_per_s", None)
        entry.pop("mfu", None)
    show(f"{run}/log.jsonl", json.dumps(entries).encode())
    return entries


def show_table(path):
    with open(path) as f:
        table = json.load(f)
    del table["command"]
    show(path, json.dumps(table, sort_keys=True).replace(repo, "REPO").encode())


# token files: the standard library, text files few and many and large, rows of text and of ids, a hub's
# layouts
conftest.cache_gpt2_tokenizer(env, os.path.join(folder, "tiktoken"))
rng = np.random.default_rng(0)
with open(json.__file__) as f:
    source = f.read()
docs = [source[i : i + n] for i, n in zip(rng.integers(0, 5000, 2500), rng.integers(1, 3000, 2500))]
docs[7] = ""
os.makedirs("text")
for i, doc in enumerate(docs[:100]):
    with open(f"text/{i}.txt", "w") as f:
        f.write(doc)
with open("large.txt", "w") as f:
    f.write("\n".join(docs))
with open("rows.jsonl", "w") as f:
    for i, doc in enumerate(docs):
        meta = dict(pile_set_name=["Pile-CC", "Books3"][i % 2])
        f.write(json.dumps(dict(text=doc, meta=meta)) + "\n")
pq.write_table(pa.table(dict(text=docs, body=docs[::-1])), "rows.parquet", row_group_size=500)
pq.write_table(pa.table(dict(input_ids=[[i, i + 1, 50256, 7] for i in range(4000)])), "ids.parquet")
script("prepare_owt.py")
script("prepare_owt.py", "--dataset=few", "--files=text/1.txt,text/2.txt")
script("prepare_owt.py", "--dataset=many", "--files=text/*.txt", "--tokenizer=gpt2")
script("prepare_owt.py", "--dataset=large", "--files=large.txt", "--tokenizer=gpt2")
script("prepare_owt.py", "--dataset=jsonl", "--files=rows.jsonl", "--tokenizer=gpt2", "--without=Books3")
mixed = ["--files=rows.parquet,text/1.txt", "--column=body", "--val_every=3"]
script("prepare_owt.py", "--dataset=parquet", *mixed)
script("prepare_owt.py", "--dataset=some", "--files=rows.parquet", "--tokens=300_000")
script("prepare_owt.py", "--dataset=own", "--files=ids.parquet", "--tokenizer=60000:5")
os.makedirs("hub/owt/refs-convert-parquet/plain_text/partial-train")
os.makedirs("hub/stories/data")
os.link("rows.parquet", "hub/owt/refs-convert-parquet/plain_text/partial-train/0000.parquet")
os.link("rows.parquet", "hub/stories/data/train-0.parquet")
os.link("ids.parquet", "hub/stories/data/test-0.parquet")
repos = {"datasets/Skylion007/openwebtext": Path("hub/owt"), "datasets/org/stories": Path("hub/stories")}
with serve(repos) as hub:
    env |= hub.env
    script("prepare_owt.py", "--dataset=owt", "--tokens=1_000_000")
    script("prepare_owt.py", "--dataset=org/stories")
show_files("data")

# a removal and its control, and what is made of them
tiny = [f"--init_from={repo}/assets/tiny", "--max_iters=100", "--lr_decay_iters=100", "--eval_interval=50"]
removal = [os.path.join(repo, "config/remove_ln_tiny.py"), *tiny]
for dtype in ("float32", "bfloat16"):
    script("train.py", *removal, f"--dtype={dtype}", f"--out_dir=out/{dtype}")
    show_log(f"out/{dtype}")
control = os.path.join(repo, "config/control.py")
script("train.py", *removal, control, "--dtype=float32", "--out_dir=out/float32_control")
extras = [
    "--max_iters=90",
    "--aux_loss_weight=0.1",
    "--dropout=0.1",
    "--gradient_checkpointing",
    "--gradient_accumulation_steps=2",
    "--batch_size=4",
]
script("train.py", *removal, "--dtype=float32", "--out_dir=out/extras", *extras)
show_log("out/extras")
scratch = [
    "--init_from=scratch",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--max_iters=20",
    "--compile=False",
    "--dtype=float32",
    "--bias=False",
]
script("train.py", *scratch, "--out_dir=out/scratch")
models = f"{repo}/assets/tiny,out/float32_control,out/float32"
table = ["--dataset=stdlib,residual", "--tokens=50_000", "--json=out/table.json"]
script("eval.py", f"--models={models}", *table)
show_table("out/table.json")
for to, *more in (["hf"], ["folded"], ["hf", "--dtype=bfloat16"], ["hf", "--dtype=float16", "--eps=1e4"]):
    script("export", "out/float32", f"--to={to}", f"--out=out/export_{to}_{len(more)}", *more)
show_files("out")
bridge = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
try:
    from tools.export import to_bridge
except ImportError:
    from export import to_bridge
from model import GPT
import torch
bridge = to_bridge(GPT.from_pretrained("out/float32/model").eval())
with torch.no_grad():
    print(hashlib.sha256(bridge(torch.arange(200)[None]).numpy().tobytes()).hexdigest())
"""
command = [sys.executable, "-c", bridge, repo]
done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
print(done.stdout.split()[-1], "logits of the TransformerBridge")

env["OMP_NUM_THREADS"] = "1"
two = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
halves = ["--batch_size=8", "--gradient_accumulation_steps=2"]
script("train.py", *removal, "--dtype=float32", "--out_dir=out/two", *halves, launcher=two)
with open("out/two/log.jsonl") as f:
    for entry in map(json.loads, f):
        words = []
        for key, value in entry.items():
            if key not in ("tokens_per_s", "mfu"):
                words.append(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}")
        print(*words)
