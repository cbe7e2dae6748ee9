"""
Only what we wrote is ever removed or replaced. Anything else is refused in one line and stays as it was.
"""
import os
import shutil
from pathlib import Path

import pytest
from conftest import SHORT, TINY, read_json, set_all_fake, write_dataset
from soak import contents

from model import GPT
from parts import files
from parts.errors import UserError
from parts.files import FolderLock

TRAIN = ["train.py", *SHORT, "--max_iters=2", "--checkpoint_interval=1", "--dataset=mine"]


@pytest.fixture
def refused(run):
    """refused(script, args..., names=...): it ends in one line with these words, and no file changes, goes or comes."""

    def refused(*args, names):
        before = contents()
        done = run(*args)
        assert names in done.error
        assert done.text.count("\n") <= 1
        assert contents() == before

    return refused


@pytest.fixture
def model(run):
    """A model of the user's in model/, and data/mine."""
    shutil.copytree(TINY, "model")
    write_dataset()


# --- prepare_owt.py


def test_of_a_data_folder_only_what_we_wrote_is_replaced_when_asked(refused, run):
    """Text where its tokens would be, or beside our tokens; nanoGPT's files, without a meta.json; a link; a file; a
    folder whose name ends in .tmp."""
    os.makedirs("data/mytext")
    Path("data/mytext/a.txt").write_text("a" * 100)
    prepare = ["prepare_owt.py", "--files=data/mytext/*.txt"]
    for name in ("mine.tmp", "mine"):
        assert run(*prepare, f"--dataset={name}").code == 0
    before = contents("data")
    assert run(*prepare, "--dataset=mine", "--force").code == 0
    assert contents("data") == before
    os.makedirs("data/other")
    for path in ("data/mine", "data/other/train.bin"):
        shutil.copy("data/mytext/a.txt", path)
    os.symlink("mine.tmp", "data/linked")
    Path("data/file").write_text("")
    refused(*prepare, "--dataset=mytext", names="data/mytext")
    for name in ("mytext", "mine", "other", "linked", "file"):
        refused(*prepare, "--force", f"--dataset={name}", names=f"data/{name}")


# --- train.py


def test_what_a_run_starts_from_and_what_is_no_run_stay(run, refused, model):
    """The model, also through a link, and the teacher; nanoGPT's folder has a ckpt.pt too, and a model directory a
    config.json; a link in a run's folder."""
    shutil.copytree("model", "project/model")
    os.symlink("project", "link")
    for source, out_dir in (("model", "."), ("model", "model"), ("project/model", "link")):
        refused(*TRAIN, f"--init_from={source}", f"--out_dir={out_dir}", names=f"init_from {source}")
    os.makedirs("nanogpt")
    Path("nanogpt/ckpt.pt").write_text("")
    for folder in ("nanogpt", "model"):
        refused(*TRAIN, f"--out_dir={folder}", names=f"out_dir {folder}")
    assert run(*TRAIN).code == 0
    refused(*TRAIN, "--init_from=model", "--kl_share=0.5", "--teacher=out/run", "--force", names="teacher out/run")
    shutil.rmtree("out/run/model")
    os.symlink("../../model", "out/run/model")
    refused(*TRAIN, names="out/run/model")


def test_what_lies_beside_a_runs_own_files_stays(run, model):
    assert run(*TRAIN).code == 0
    Path("out/run/model/tokenizer.json").write_text("{}")
    shutil.copy("out/run/ckpt.pt", "out/run/ckpt-500.pt")
    Path("out/run/ckpt.pt.tmp").write_text("mine")
    for flag in ("--init_from=resume", "--force"):
        assert run(*TRAIN, flag).code == 0
        assert sorted(os.listdir("out/run/model")) == ["config.json", "model.safetensors", "tokenizer.json"]
        names = [name for name in os.listdir("out/run") if "ckpt" in name]
        assert sorted(names) == ["ckpt-1.pt", "ckpt-500.pt", "ckpt.pt", "ckpt.pt.tmp"]


@pytest.mark.parametrize("there", [False, True])
def test_a_run_is_only_replaced_with_force_and_by_one_process_at_a_time(run, refused, model, at_step, there):
    """One that goes on, in a new folder or an empty one; a finished one; one without model/, which can also be
    resumed."""

    def try_to_lock():
        with pytest.raises(UserError, match="out/run"):
            FolderLock("out/run")

    if there:
        os.makedirs("out/run")
    at_step(0, try_to_lock)
    assert run(*TRAIN).code == 0
    refused(*TRAIN, "--seed=2", names="--force")
    holder = FolderLock("out/run")
    for flag in ("--force", "--init_from=resume"):
        refused(*TRAIN, flag, names="out/run is in use")
    del holder
    assert run(*TRAIN, "--seed=2", "--force").code == 0
    assert read_json("out/run/settings.json")["seed"] == 2
    shutil.rmtree("out/run/model")
    refused(*TRAIN, "--seed=2", names="--init_from=resume")
    assert run(*TRAIN, "--seed=2", "--init_from=resume").code == 0


def test_without_fcntl_as_on_windows_folders_are_not_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert len([FolderLock(tmp_path) for _ in range(2)]) == 2


# --- eval.py and the tools


def test_a_table_replaces_only_a_table(run, refused, model):
    table = ["eval.py", "--models=model", "--tokens=512", "--dataset=residual,mine", "--block_size=64"]
    Path("notes.json").write_text('{"mine": 1}')
    os.symlink("/dev/null", "device.json")
    os.symlink("notes.json", "link.json")
    for path in ("notes.json", "device.json", "link.json", "/dev/null"):
        refused(*table, f"--json={path}", names=path)
    Path("table.json.tmp").write_text("mine")
    for _ in range(2):
        assert run(*table, "--json=table.json").code == 0
    assert len(read_json("table.json")["rows"]) == 2
    assert Path("table.json.tmp").read_text() == "mine"


def test_an_export_replaces_what_a_kill_left(run):
    set_all_fake(GPT.from_pretrained(TINY)).save_pretrained("free")
    os.makedirs(files.unfinished("mine"))
    assert run("tools.export", "free", "--out=mine").code == 0
    assert sorted(os.listdir()) == ["free", "mine"]
