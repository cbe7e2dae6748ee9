"""Only what we wrote is ever removed or replaced; anything else is refused in one line, and stands as it was."""
import json
import os
import shutil

import pytest
from conftest import TINY, random_hf

SHORT = ["--max_iters=2", "--eval_interval=1", "--batch_size=2", "--block_size=32", "--eval_iters=1", "--compile=False"]


def contents(folder="."):
    """{path: bytes} of all files below a folder, and {path: None} of what is neither a file nor a folder."""
    found = {}
    for below, _, names in os.walk(folder):
        for path in (os.path.join(below, name) for name in names):
            found[path] = open(path, "rb").read() if os.path.isfile(path) else None
    return found


@pytest.fixture
def refused(run):
    """refused(script, args..., message=...): it ends with this one line, and no file is changed, gone or new."""

    def refused(*args, message):
        before = contents()
        done = run(*args)
        assert done.code == 1 and message in done.text and done.text.count("\n") <= 1, done.text
        assert contents() == before

    return refused


# --- prepare_owt.py


@pytest.fixture
def text(tmp_path):
    os.makedirs("data/mytext")
    with open("data/mytext/a.txt", "w") as f:
        f.write("a" * 100)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_text_that_lies_where_its_tokens_would_be_stays(run, refused, text, force):
    refused("prepare_owt.py", "--dataset=mytext", "--files=data/mytext/*.txt", *force, message="data/mytext holds a.txt, which was not written here")


def test_text_beside_our_own_tokens_stays(run, refused, text):
    assert run("prepare_owt.py", "--dataset=mine", "--files=data/mytext/*.txt").code == 0
    shutil.copy("data/mytext/a.txt", "data/mine")
    refused("prepare_owt.py", "--dataset=mine", "--files=data/mine/*.txt", "--force", message="data/mine holds a.txt")


def test_token_files_of_another_program_stay(refused, run, text):
    """nanoGPT's: train.bin and val.bin, without a meta.json."""
    os.makedirs("data/other")
    for split in ("train", "val"):
        shutil.copy("data/mytext/a.txt", f"data/other/{split}.bin")
    refused("prepare_owt.py", "--dataset=other", "--files=data/mytext/*.txt", "--force", message="data/other holds train.bin")


def test_a_link_and_a_file_in_the_place_of_the_tokens_stay(refused, text):
    os.makedirs("elsewhere")
    os.symlink("../elsewhere", "data/linked")
    open("data/file", "w").close()
    args = ["prepare_owt.py", "--files=data/mytext/*.txt", "--force"]
    refused(*args, "--dataset=linked", message="data/linked is a link")
    refused(*args, "--dataset=file", message="data/file is a file")


def test_a_folder_that_only_bears_the_name_of_a_half_written_one_stays(refused, text):
    os.makedirs("data/mine.tmp")
    shutil.copy("data/mytext/a.txt", "data/mine.tmp")
    refused("prepare_owt.py", "--dataset=mine", "--files=data/mytext/*.txt", "--force", message="data/mine.tmp holds a.txt")


def test_what_we_wrote_is_replaced_when_asked(run, text):
    args = ["prepare_owt.py", "--dataset=mine", "--files=data/mytext/*.txt", "--force"]
    assert run(*args).code == 0
    before = contents("data/mine")
    assert run(*args).code == 0 and contents("data/mine") == before and sorted(os.listdir("data")) == ["mine", "mytext"]


# --- train.py


@pytest.fixture
def model(run, stdlib):
    """A model of the user's in model/."""
    shutil.copytree(TINY, "model")


def test_the_model_that_a_run_starts_from_stays(run, refused, model):
    train = ["train.py", *SHORT, "--init_from=model"]
    refused(*train, "--out_dir=.", message="init_from model is in out_dir .")
    refused(*train, "--out_dir=model", message="init_from model is in out_dir model")
    shutil.copytree("model", "project/model")
    refused(*train[:-1], "--init_from=project/model", "--out_dir=project", message="init_from project/model is in out_dir project")
    os.symlink("project", "link")
    refused(*train[:-1], "--init_from=project/model", "--out_dir=link", message="init_from project/model is in out_dir link")


def test_a_folder_of_the_users_is_no_out_dir(refused, model):
    """Nor is one with nanoGPT's ckpt.pt, or a bundled model's."""
    os.makedirs("nanogpt")
    open("nanogpt/ckpt.pt", "w").close()
    for folder in ("nanogpt", "model"):
        refused("train.py", *SHORT, f"--init_from={TINY}", f"--out_dir={folder}", message=f"out_dir {folder} holds files, and is not an earlier run's")


def test_a_link_in_a_runs_folder_stays(run, refused, model):
    train = ["train.py", *SHORT, f"--init_from={TINY}"]
    assert run(*train).code == 0
    shutil.rmtree("out/run/model")
    os.symlink("../../model", "out/run/model")
    refused(*train, message="out/run/model is a link")


def test_what_lies_beside_a_runs_own_model_stays(run, model):
    train = ["train.py", *SHORT, f"--init_from={TINY}"]
    assert run(*train).code == 0
    with open("out/run/model/tokenizer.json", "w") as f:
        f.write("{}")
    assert run(*train).code == 0
    assert sorted(os.listdir("out/run/model")) == ["config.json", "model.safetensors", "tokenizer.json"]


# --- eval.py, export.py, plot.py


def test_a_table_replaces_nothing_but_a_table(run, refused, stdlib):
    table = ["eval.py", f"--models={TINY}", "--tokens=512"]
    with open("notes.json", "w") as f:
        f.write('{"mine": 1}')
    os.symlink("/dev/null", "device.json")
    os.symlink("notes.json", "link.json")
    for path in ("notes.json", "device.json", "link.json", "/dev/null"):
        refused(*table, f"--json={path}", message=f"{path} is there already and was not written here")
    assert run(*table, "--json=table.json").code == 0 and run(*table, "--json=table.json").code == 0
    assert len(json.load(open("table.json"))["rows"]) == 1


def test_an_export_replaces_nothing(run, refused):
    from conftest import set_all_fake

    from model import GPT

    random_hf().save_pretrained("hf")
    set_all_fake(GPT.from_pretrained("hf")).save_pretrained("free")
    os.makedirs("mine.tmp")
    open("mine.tmp/notes.txt", "w").close()
    refused("export.py", "free", "--out=mine", message="mine.tmp is in the way")
    refused("export.py", "free", "--out=hf", message="hf exists: remove it")


def test_a_picture_replaces_nothing_but_a_picture_of_ours(run, refused, stdlib):
    assert run("eval.py", f"--models={TINY}", "--dataset=residual", "--tokens=512", "--json=table.json").code == 0
    open("table.png", "w").close()
    refused("plot.py", "table.json", message="table.png is there already and was not drawn by plot.py")
    os.remove("table.png")
    assert run("plot.py", "table.json").code == 0 and run("plot.py", "table.json").code == 0
