"""
Whatever a file or a command line holds, our parsers take it or refuse it in one line: no other exception, no code that
runs, no hang, no memory beyond 3 GB. FUZZ_INPUTS says how many inputs each parser gets: 10, and 2,000 by `make soak`.
"""
import copy
import json
import os
import resource
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import prepare_owt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SCHEDULE, default_settings, random_hf, set_all_fake, write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import configure
from model import GPT
from parts import card, checkpoint, data, files, hellaswag, run, sources
from parts.errors import UserError
from parts.tokenizer import make_tokenizer
from schedule import timeline
from tools import plot

FUZZ = settings(max_examples=int(os.environ.get("FUZZ_INPUTS", 10)), deadline=timedelta(seconds=10), derandomize=True,
                database=None, suppress_health_check=list(HealthCheck))
ASKED = dict(tokenizer="bytes", vocab_size=257, eot=256, source="a.txt")


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- the files, and what reads them


class Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def read_rows(path):
    return list(sources.read_rows(sources.Source(path, path, 1, ""), "", 0, None))


FILES = {
    "data/mine/meta.json": lambda: (data.open_tokens("mine", "val", 16, 257), data.check_tokens("mine", "val")),
    "data/mine/val.bin": lambda: (data.open_tokens("mine", "val", 16, 257), data.check_tokens("mine", "val")),
    "prepared/meta.json": lambda: prepare_owt.is_prepared("prepared", ASKED),
    "run/settings.json": lambda: files.run_settings("run").get("init_from", "").strip(),
    "run/log.jsonl": lambda: (list(run.log_entries("run/log.jsonl")), plot.read_log("run")),
    "run/eval.json": lambda: (card.evaluation("run", "0" * 64), plot.read_rows("run/eval.json")),
    "run/ckpt.pt": lambda: checkpoint.load("run"),
    "real/config.json": lambda: GPT.from_pretrained("real"),
    "real/model.safetensors": lambda: GPT.from_pretrained("real"),
    "fake/config.json": lambda: GPT.from_pretrained("fake"),
    "shards/model.safetensors.index.json": lambda: GPT.from_pretrained("shards"),
    "pickle/pytorch_model.bin": lambda: GPT.from_pretrained("pickle"),
    "own/tokenizer.json": lambda: make_tokenizer("own"),
    "own/tokenizer_config.json": lambda: make_tokenizer("own"),
    "rows.jsonl": lambda: read_rows("rows.jsonl"),
    "rows.parquet": lambda: read_rows("rows.parquet"),
    "hellaswag.jsonl": lambda: hellaswag.read_examples("hellaswag.jsonl"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, own_model):
    """{path: the bytes of a good file}, all in a folder that becomes the working one."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    write_dataset()
    shutil.copytree("data/mine", "prepared")
    hf = random_hf(n_layer=1, n_embd=8, n_head=2, vocab_size=257, n_positions=16)
    hf.save_pretrained("real")
    hf.save_pretrained("shards", max_shard_size="4KB")
    hf.config.save_pretrained("pickle")
    torch.save(dict(hf.transformer.state_dict()), "pickle/pytorch_model.bin")
    model = set_all_fake(GPT.from_pretrained("real"))
    model.save_pretrained("fake")
    shutil.copytree(own_model, "own")
    os.mkdir("run")
    asked = dict(init_from="real", dataset="mine", ln_schedule=[list(row) for row in SCHEDULE])
    torch.save(dict(model=model.state_dict(), model_config=vars(model.config), ln_state=model.ln_state(), optimizers=[],
                    step=1, settings=asked, rng=[dict(cpu=torch.get_rng_state())]), "run/ckpt.pt")
    std = dict(mean=1.0, spread=0.1)
    table = [dict(dataset="mine", role="ln_free", source="a", loss=3.0, loss_se=None, gap=0.1, gap_se=0.01),
             dict(dataset="residual", role="ln_free", source="a", sink_rate=0.1, sites=dict(ln_f=dict(others=std)))]
    for path, lines in {
        "prepared/meta.json": [json.loads(Path("data/mine/meta.json").read_text()) | ASKED],
        "run/settings.json": [asked],
        "run/eval.json": [dict(weights_sha256=dict(a="0" * 64), rows=table)],
        "run/log.jsonl": [dict(step=0, val_loss=3.0), dict(step=0, loss=3.0), dict(step=1, event="bos")],
        "rows.jsonl": [dict(text="a"), dict(text="b")],
        "hellaswag.jsonl": [dict(ctx="a", endings=["b", "c", "d", "e"], label=1)] * 2,
    }.items():
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(pa.table({"text": ["a", None, "b" * 50]}), "rows.parquet")
    yield {path: Path(path).read_bytes() for path in FILES}
    os.chdir(before)


# --- what is wrong with them

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
                    st.sampled_from([2**31, 2**63, 10**40, -1, 0, 1]))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
tensors = st.sampled_from([torch.zeros(3), torch.ones(2).long(), torch.tensor(1.0), torch.eye(2).to_sparse(), Code()])
deep = st.integers(1, 5).map(lambda n: b"[" * 10**n)


@st.composite
def changed(draw, document, others=values):
    """A document in which something is another value, or missing."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    how = draw(st.sampled_from(["other", "missing", "inside", "inside", "inside"])) if keys else "other"
    if how == "other":
        return draw(others)
    document, key = copy.copy(document), draw(st.sampled_from(keys))
    if how == "missing":
        del document[key]
    else:
        document[key] = draw(changed(document[key], others))
    return document


@st.composite
def wrong(draw, path, content):
    """The bytes of a file with something wrong in what it says, or in how it is written."""
    # pyarrow crashes on a row `null`, which prepare_owt.py survives: it reads rows in a process of its own
    says = draw(st.booleans()) and path != "rows.jsonl"
    if says and path.endswith(("json", "jsonl")):
        documents = [json.loads(line) for line in (content.splitlines() if path.endswith("jsonl") else [content])]
        i = draw(st.integers(0, len(documents) - 1))
        documents[i] = draw(changed(documents[i]))
        return draw(deep | st.just("".join(json.dumps(document) + "\n" for document in documents).encode()))
    if says and content.startswith(b"PK"):  # torch.save's
        torch.save(draw(changed(torch.load(path, weights_only=True), values | tensors)), "changed")
        return Path("changed").read_bytes()
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):  # near the beginning
        content[draw(st.integers(0, min(len(content), 3000) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


# --- taken, or refused in one line


def take_or_refuse(parse, *args):
    with suppress(UserError):  # which is one line
        parse(*args)
    assert not os.path.exists("code_ran")


@pytest.mark.parametrize("path", FILES)
@given(st.data())
@FUZZ
def test_a_file(good, path, choose):
    try:
        Path(path).write_bytes(choose.draw(wrong(path, good[path])))
        take_or_refuse(FILES[path])
    finally:
        Path(path).write_bytes(good[path])
    FILES[path]()


ROWS = st.one_of(
    values,
    st.tuples(st.sampled_from(["ln_2", "ln_1v", "ln_f", "bos", "h.1.ln_2"]), values, values),
    st.tuples(st.sampled_from(["ln_2", "ln_1qk"]), st.floats(0, 1), st.none() | st.integers(0, 3)),
)
NAMES = st.sampled_from(["max_iters", "learning_rate", "ln_schedule", "dtype", "force", "out_dir", "init_from"])
ARGUMENTS = st.one_of(
    st.builds("--{}".format, NAMES),
    st.builds("--{}={}".format, NAMES, values | st.text(max_size=12)),
    st.sampled_from(["auto", "config.py", "--", "-x"]) | st.text(max_size=12),
)


@given(st.lists(ROWS, max_size=3), st.lists(ARGUMENTS, max_size=5))
@FUZZ
def test_a_schedule_and_a_command_line(good, rows, argv):
    take_or_refuse(timeline, rows, 3, 20)
    take_or_refuse(configure, default_settings(), argv, "", {}, {}, {}, {}, True)
