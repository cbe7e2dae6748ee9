"""
Whatever a file or a command line holds, our parsers take it or refuse it in one line: no other exception, no hang, no
memory beyond 3 GB. FUZZ_INPUTS says how many inputs each one gets: 25, and 2,000 by `make soak`.
"""
import copy
import json
import os
import resource
import runpy
import shutil
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPO, SCHEDULE, random_hf, read_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import plot
from configurator import configure
from model import GPT
from parts import card, checkpoint, data, files, hellaswag, hub, preparation, run, sources, tokenizer
from parts.errors import UserError
from schedule import timeline

INPUTS = int(os.environ.get("FUZZ_INPUTS", 25))
MEMORY = 3 * 2**30


def fuzz(share=1.0):
    """A test of INPUTS inputs, or a share of them where each takes long; always the same ones."""
    return settings(max_examples=max(5, int(INPUTS * share)), deadline=timedelta(seconds=10), derandomize=True,
                    database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one good file of each kind, which becomes the working one."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    random_hf(n_layer=1, n_embd=8, n_head=2, vocab_size=257, n_positions=16).save_pretrained("hf")
    model = GPT.from_pretrained("hf")
    for name, site in model.sites().items():
        site.ln_mode = "fake"
    model.save_pretrained("free")
    yield model
    os.chdir(before)


def refused_or_taken(f, *args):
    try:
        return f(*args)
    except UserError as e:
        assert "\n" not in str(e)
        return None


# --- values, and documents with one thing wrong

numbers = st.one_of(st.integers(), st.sampled_from([2**31, 2**63, 10**40, -1, 0, 1]), st.floats())
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=10,
)
deep = st.integers(1, 5).map(lambda n: "[" * 10**n)


def places(document, path=()):
    """The paths of all that is in a document."""
    yield path
    if isinstance(document, list):
        document = dict(enumerate(document))
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from places(value, (*path, key))


@st.composite
def changed(draw, document):
    """A document in which something is another value, or missing."""
    path = draw(st.sampled_from(list(places(document))))
    value = draw(values)
    if not path:
        return value
    document = copy.deepcopy(document)
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    if draw(st.booleans()) and isinstance(inside, dict):
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return document


@st.composite
def damaged(draw, content, most=400):
    """Bytes of which some near the beginning are others, or that are cut."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(len(content), most) - 1))
        content[at] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        content = content[: draw(st.integers(0, len(content)))]
    return bytes(content)


def texts_of(document):
    """A JSON file with one thing wrong: in what it says, or in how it is written."""
    text = json.dumps(document)
    return st.one_of(changed(document).map(json.dumps), damaged(text.encode(), len(text)), deep)


def write(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as f:
        f.write(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))


# --- JSON of ours

SPLIT = dict(tokens=40, documents=1, eot_appended=1, sha256="0" * 64)
META = dict(tokenizer="bytes", vocab_size=257, eot=256, source="a.txt", asked_tokens=0, train=SPLIT, val=SPLIT)
RUN = dict(init_from="hf", dataset="mine", ln_schedule=[list(row) for row in SCHEDULE], seed=1, run="0" * 16)
LOG = [dict(step=0, run="0" * 16), dict(step=0, val_loss=3.0), dict(step=0, loss=3.0), dict(step=1, event="bos")]
STD = dict(mean=1.0, spread=0.1)
SITES = dict(ln_f=dict(position_0=STD, eot=None, others=STD))
TABLE = dict(weights_sha256=dict(a="0" * 64), rows=[
    dict(dataset="owt", role="ln_free", source="a", loss=3.0, loss_se=None, gap=0.1, gap_se=0.01),
    dict(dataset="residual", role="ln_free", source="a", sink_rate=0.1, sites=SITES),
])


@given(texts_of(META))
@fuzz()
def test_meta(folder, text):
    write("data/mine/meta.json", text)
    write("data/mine/val.bin", np.arange(40, dtype="<u2").tobytes())
    if refused_or_taken(data.read_meta, "mine"):
        refused_or_taken(data.open_tokens, "mine", "val", 16, 257)
        refused_or_taken(data.check_tokens, "mine", "val")
    refused_or_taken(preparation.is_prepared, "data/mine", META)
    card.trained_on("mine")


@given(texts_of(RUN))
@fuzz()
def test_settings_of_a_run(folder, text):
    write("run/settings.json", text)
    found = files.run_settings("run")
    assert found == {} or isinstance(found["init_from"], str)


@given(changed(LOG), st.binary(max_size=30))
@fuzz()
def test_log(folder, log, more):
    lines = [json.dumps(entry) for entry in log] if isinstance(log, list) else [json.dumps(log)]
    write("run/log.jsonl", "\n".join(lines).encode() + b"\n" + more)
    refused_or_taken(plot.read_log, "run")
    refused_or_taken(run.lines_before, "run/log.jsonl", 1)


@given(texts_of(TABLE))
@fuzz()
def test_table(folder, text):
    write("run/eval.json", text)
    refused_or_taken(plot.read_rows, "run/eval.json")
    rows, why_none = card.evaluation("run", "0" * 64)
    card.table(rows)
    assert rows or why_none


@given(texts_of(dict(meta=META, sources=["0" * 64, "0" * 64], position=[0, 1, 1], documents=1, train=SPLIT, val=SPLIT,
                     redo=dict(position=[0, 0, 0], documents=0, train=SPLIT, val=SPLIT))))
@fuzz()
def test_progress_of_a_preparation(folder, text):
    write("data/mine.tmp/progress.json", text)
    refused_or_taken(preparation.resume, "data/mine.tmp", META, [sources.Source("a.txt", 5, str)], False)


# --- models


@given(st.data())
@fuzz()
def test_config(folder, choose):
    name = choose.draw(st.sampled_from(["hf", "free"]))
    shutil.copytree(name, "changed", dirs_exist_ok=True)
    write("changed/config.json", choose.draw(texts_of(read_json(f"{name}/config.json"))))
    refused_or_taken(GPT.from_pretrained, "changed")
    tokenizer.tokenizer_of(folder, "hf")


@given(st.data())
@fuzz()
def test_safetensors(folder, choose):
    shutil.copytree("hf", "weights", dirs_exist_ok=True)
    with open("hf/model.safetensors", "rb") as f:
        content = f.read()
    write("weights/model.safetensors", choose.draw(damaged(content, 3000)))
    refused_or_taken(GPT.from_pretrained, "weights")


@given(texts_of(dict(metadata={}, weight_map={"a": "model-1.safetensors", "b": "../../model.safetensors"})))
@fuzz()
def test_index_of_shards(folder, text):
    write("sharded/model.safetensors.index.json", text)
    refused_or_taken(hub.weight_files, "sharded")


@st.composite
def changed_tensors(draw, document):
    """As changed, of a document with tensors, in which another value can be a tensor of another kind."""
    path = draw(st.sampled_from([path for path in places(document) if path]))
    others = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.tensor(1.0), torch.eye(2).to_sparse()]
    document = copy.deepcopy(document)
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = draw(st.one_of(values, st.sampled_from(others)))
    return document


@given(st.data())
@fuzz()
def test_checkpoint(folder, choose):
    optimizer = torch.optim.AdamW(folder.parameters())
    state = {i: dict(step=torch.tensor(1.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
             for i, p in enumerate(folder.parameters())}
    whole = dict(
        model=folder.state_dict(),
        model_config=vars(folder.config),
        ln_state=folder.ln_state(),
        optimizers=[dict(state=state, param_groups=[])],
        step=1,
        settings=RUN,
        rng=[dict(cpu=torch.get_rng_state())],
    )
    os.makedirs("resumed", exist_ok=True)
    torch.save(choose.draw(changed_tensors(whole)), "resumed/ckpt.pt")
    if choose.draw(st.booleans()):
        with open("resumed/ckpt.pt", "rb") as f:
            content = f.read()
        write("resumed/ckpt.pt", choose.draw(damaged(content, 2000)))
    refused_or_taken(checkpoint.load, "resumed", 0.0)


@given(st.data())
@fuzz()
def test_pytorch_model_bin(folder, choose):
    shutil.copytree("hf", "pickled", dirs_exist_ok=True)
    os.path.exists("pickled/model.safetensors") and os.remove("pickled/model.safetensors")
    tensors = {name: t.contiguous() for name, t in GPT.from_pretrained("hf").hf_tensors().items()}
    torch.save(choose.draw(st.one_of(changed_tensors(tensors), values)), "pickled/pytorch_model.bin")
    refused_or_taken(GPT.from_pretrained, "pickled")


# --- text, rows, examples


@given(texts_of(dict(ctx="a", endings=["b", "c", "d", "e"], label=1)))
@fuzz()
def test_hellaswag(folder, text):
    write("hellaswag.jsonl", text)
    refused_or_taken(hellaswag.read_examples, "hellaswag.jsonl")


@given(st.data())
@fuzz()
def test_tokenizer(folder, own_model, choose):
    shutil.copytree(own_model, "own", dirs_exist_ok=True)
    file = choose.draw(st.sampled_from(["tokenizer_config.json", "config.json", "tokenizer.json"]))
    with open(f"{own_model}/{file}", "rb") as f:
        content = f.read()
    if file == "tokenizer.json":
        write("own/tokenizer.json", choose.draw(damaged(content, 3000)))
    else:
        write(f"own/{file}", choose.draw(texts_of(json.loads(content))))
    refused_or_taken(tokenizer.make_tokenizer, "own")


def all_rows(path):
    return list(sources.read_rows(path, 0, "", ""))


@given(st.lists(changed(dict(text="a")), min_size=1, max_size=3), st.binary(max_size=10))
@fuzz(0.2)
def test_rows_of_json(folder, rows, more):
    write("rows.jsonl", "\n".join(map(json.dumps, rows)).encode() + more)
    refused_or_taken(all_rows, "rows.jsonl")


@given(st.data())
@fuzz()
def test_rows_of_parquet(folder, choose):
    pq.write_table(pa.table({"text": ["a", None, "b" * 50]}), "rows.parquet")
    with open("rows.parquet", "rb") as f:
        content = f.read()
    write("rows.parquet", choose.draw(damaged(content, len(content))))
    refused_or_taken(all_rows, "rows.parquet")


# --- what is typed

NAMES = st.sampled_from(["max_iters", "learning_rate", "ln_schedule", "dtype", "force", "out_dir", "init_from"])
ARGUMENTS = st.lists(st.one_of(
    NAMES.map("--{}".format),
    st.tuples(NAMES, st.one_of(values, st.text(max_size=12))).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    st.sampled_from(["auto", "config.py", "--", "-x"]),
    st.text(max_size=12),
), max_size=5)
with open(os.path.join(REPO, "train.py")) as f:
    SETTINGS = f.read().split("# ---")[1].partition("\n")[2]


@given(ARGUMENTS)
@fuzz()
def test_command_line(folder, argv):
    write("script.py", SETTINGS)
    before = runpy.run_path("script.py")
    refused_or_taken(configure, before, run.without_auto(argv), "")


ROW = st.one_of(values, st.tuples(st.sampled_from(["ln_2", "ln_1v", "ln_f", "bos", "h.1.ln_2"]), values, values),
                st.tuples(st.sampled_from(["ln_2", "ln_1qk"]), st.floats(0, 1), st.none() | st.integers(0, 3), values))


@given(st.lists(ROW, max_size=3))
@fuzz()
def test_schedule(folder, rows):
    refused_or_taken(timeline, rows, 3, 20)
