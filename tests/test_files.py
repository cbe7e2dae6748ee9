"""
Only what we wrote is ever removed or replaced; anything else is refused in one line, and stands as it
was.
"""
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, SHORT, TINY, random_hf, read_json, set_all_fake

from model import GPT

TRAIN = ["train.py", *SHORT, "--max_iters=2", "--checkpoint_interval=1"]


def contents(folder="."):
    """{path: bytes} of all files below a folder, and {path: None} of what is neither a file nor a
    folder."""
    found = {}
    for below, _, names in os.walk(folder):
        for name in names:
            path = Path(below, name)
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def refused(run):
    """refused(script, args..., message=...): it ends with this one line, and no file is changed,
    gone or new."""

    def refused(*args, message):
        before = contents()
        done = run(*args)
        assert message in done.error
        assert done.text.count("\n") <= 1
        assert contents() == before

    return refused


# --- prepare_owt.py


PREPARE = ["prepare_owt.py", "--files=data/mytext/*.txt"]


@pytest.fixture
def text(run):
    """data/mytext/a.txt, the user's text."""
    os.makedirs("data/mytext")
    with open("data/mytext/a.txt", "w") as f:
        f.write("a" * 100)


@pytest.mark.parametrize("force", [
    [],
    ["--force"],
])
def test_text_that_lies_where_its_tokens_would_be_stays(run, refused, text, force):
    message = "data/mytext holds a.txt, which was not written here"
    refused(*PREPARE, "--dataset=mytext", *force, message=message)


def test_text_beside_our_own_tokens_stays(run, refused, text):
    assert run(*PREPARE, "--dataset=mine").code == 0
    shutil.copy("data/mytext/a.txt", "data/mine")
    args = ["--dataset=mine", "--files=data/mine/*.txt", "--force"]
    refused("prepare_owt.py", *args, message="data/mine holds a.txt")


def test_token_files_of_another_program_stay(refused, run, text):
    """nanoGPT's: train.bin and val.bin, without a meta.json."""
    os.makedirs("data/other")
    for split in ("train", "val"):
        shutil.copy("data/mytext/a.txt", f"data/other/{split}.bin")
    refused(*PREPARE, "--dataset=other", "--force", message="data/other holds train.bin")


def test_a_link_and_a_file_in_the_place_of_the_tokens_stay(refused, text):
    os.makedirs("elsewhere")
    os.symlink("../elsewhere", "data/linked")
    open("data/file", "w").close()
    refused(*PREPARE, "--force", "--dataset=linked", message="data/linked is a link")
    refused(*PREPARE, "--force", "--dataset=file", message="data/file is a file")


def test_a_folder_that_only_bears_the_name_of_a_half_written_one_stays(refused, text):
    os.makedirs("data/mine.tmp")
    shutil.copy("data/mytext/a.txt", "data/mine.tmp")
    refused(*PREPARE, "--dataset=mine", "--force", message="data/mine.tmp holds a.txt")


def test_what_we_wrote_is_replaced_when_asked(run, text):
    assert run(*PREPARE, "--dataset=mine", "--force").code == 0
    before = contents("data/mine")
    assert run(*PREPARE, "--dataset=mine", "--force").code == 0
    assert contents("data/mine") == before
    assert sorted(os.listdir("data")) == ["mine", "mytext"]


# --- train.py


@pytest.fixture
def model(run, stdlib):
    """A model of the user's in model/."""
    shutil.copytree(TINY, "model")


@pytest.mark.parametrize("init_from, out_dir", [
    ("model", "."),
    ("model", "model"),
    ("project/model", "project"),
    ("project/model", "link"),
])
def test_the_model_that_a_run_starts_from_stays(refused, model, init_from, out_dir):
    shutil.copytree("model", "project/model")
    os.symlink("project", "link")
    message = f"init_from {init_from} is in out_dir {out_dir}"
    refused(*TRAIN, f"--init_from={init_from}", f"--out_dir={out_dir}", message=message)


def test_the_model_that_a_run_learns_from_stays(run, refused, model):
    assert run(*TRAIN).code == 0
    args = ["--init_from=model", "--kl_share=0.5", "--teacher=out/run", "--force"]
    refused(*TRAIN, *args, message="teacher out/run is in out_dir out/run")


@pytest.mark.parametrize("folder", ["nanogpt", "model"])
def test_a_folder_of_the_users_is_no_out_dir(refused, model, folder):
    """nanoGPT's has a ckpt.pt too, and a model directory a config.json."""
    os.makedirs("nanogpt")
    open("nanogpt/ckpt.pt", "w").close()
    message = f"out_dir {folder} holds files, and is not an earlier run's"
    refused(*TRAIN, f"--out_dir={folder}", message=message)


def test_a_link_in_a_runs_folder_stays(run, refused, model):
    assert run(*TRAIN).code == 0
    shutil.rmtree("out/run/model")
    os.symlink("../../model", "out/run/model")
    refused(*TRAIN, message="out/run/model is a link")


def test_what_lies_beside_a_runs_own_model_stays(run, model):
    assert run(*TRAIN).code == 0
    with open("out/run/model/tokenizer.json", "w") as f:
        f.write("{}")
    assert run(*TRAIN, "--force").code == 0
    assert sorted(os.listdir("out/run/model")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_finished_run_stays_but_for_force(run, refused, model):
    """So that `--out_dir` after config/control.py does not replace the LN-free run with its control."""
    assert run(*TRAIN).code == 0
    refused(*TRAIN, "--seed=2", message="out_dir out/run holds a finished run: choose another, or replace it")
    assert run(*TRAIN, "--seed=2", "--force").code == 0
    assert read_json("out/run/settings.json")["seed"] == 2


def test_a_run_that_is_not_finished_stays_but_for_force(run, refused, model):
    assert run(*TRAIN).code == 0
    shutil.rmtree("out/run/model")
    refused(*TRAIN, message="out_dir out/run holds a run that is not finished: go on with --init_from=resume")
    assert run(*TRAIN, "--init_from=resume").code == 0
    assert os.path.exists("out/run/model/config.json")


def hold(folder):
    """A process of its own that holds the folder as a run or a preparation does."""
    gc.collect()  # what has run in this process lets go of it
    code = "import sys; from parts.files import FolderLock; lock = FolderLock(sys.argv[1]); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, folder], cwd=REPO, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_of_two_runs_in_one_folder_the_second_is_refused(run, refused, model):
    assert run(*TRAIN).code == 0
    holder = hold(os.path.abspath("out/run"))
    refused(*TRAIN, "--force", message="out/run is in use by another process")
    refused(*TRAIN, "--init_from=resume", message="out/run is in use by another process")
    holder.communicate("\n")
    assert run(*TRAIN, "--force").code == 0


def test_of_two_preparations_of_one_data_set_the_second_is_refused(run, refused, text):
    os.makedirs("data/mine.tmp")
    holder = hold(os.path.abspath("data/mine.tmp"))
    refused(*PREPARE, "--dataset=mine", message="data/mine.tmp is in use by another process")
    holder.communicate("\n")
    assert run(*PREPARE, "--dataset=mine").code == 0


# --- eval.py, export.py, plot.py


def test_a_table_replaces_nothing_but_a_table(run, refused, stdlib):
    table = ["eval.py", f"--models={TINY}", "--tokens=512"]
    with open("notes.json", "w") as f:
        f.write('{"mine": 1}')
    os.symlink("/dev/null", "device.json")
    os.symlink("notes.json", "link.json")
    for path in ("notes.json", "device.json", "link.json", "/dev/null"):
        refused(*table, f"--json={path}", message=f"{path} is there already and was not written here")
    for _ in range(2):  # the second one replaces the first
        assert run(*table, "--json=table.json").code == 0
    assert len(read_json("table.json")["rows"]) == 1


def test_an_export_replaces_nothing(run, refused):
    random_hf().save_pretrained("hf")
    set_all_fake(GPT.from_pretrained("hf")).save_pretrained("free")
    os.makedirs("mine.tmp")
    open("mine.tmp/notes.txt", "w").close()
    refused("export.py", "free", "--out=mine", message="mine.tmp is in the way")
    refused("export.py", "free", "--out=hf", message="hf exists: remove it")


def test_a_picture_replaces_nothing_but_a_picture_of_ours(run, refused, stdlib):
    table = ["--dataset=residual", "--tokens=512", "--json=table.json"]
    assert run("eval.py", f"--models={TINY}", *table).code == 0
    open("table.png", "w").close()
    message = "table.png is there already and was not drawn by plot.py"
    refused("plot.py", "table.json", message=message)
    os.remove("table.png")
    for _ in range(2):  # the second one replaces the first
        assert run("tools.plot", "table.json").code == 0
