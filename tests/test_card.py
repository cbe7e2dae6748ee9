"""
The model card of an export: its lines open the model when they are run as printed, and its head is what the
hub reads.
"""
import json
import os
import re

import huggingface_hub as hub
import pytest
import torch
from conftest import random_hf, run_alone, set_all_fake
from tiny_hub import serve

from model import GPT
from parts.run import weights_sha256


@pytest.fixture
def gpt2_run(tmp_path, run, gpt2_tokenizer):
    """An LN-free random model of GPT-2's vocabulary, as a run leaves it."""
    return save_run(tmp_path, random_hf(vocab_size=50257))


@pytest.fixture
def bare_run(tmp_path, run):
    """The same, of ids alone."""
    return save_run(tmp_path, random_hf(vocab_size=300))


def save_run(folder, hf):
    hf.save_pretrained(folder / "hf")
    model = GPT.from_pretrained(folder / "hf").eval()
    model.measure_std(torch.randint(0, hf.config.vocab_size - 1, (2, 64)))
    set_all_fake(model).save_pretrained(folder / "out/mine/model")
    return model


def run_lines(directory, until=None):
    """The names that the card's Python leaves."""
    with open(directory + "/README.md") as f:
        code = re.search(r"```python\n(.*?)```", f.read(), re.DOTALL)[1]
    names = {}
    exec(code.partition(until)[0] if until else code, names)
    return names


def test_the_lines_of_the_plain_form_open_it_in_every_tool(run, gpt2_run):
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    found = run_lines("out/mine/hf")

    text = "Once upon a time"
    with torch.no_grad():
        ids = found["bridge"].to_tokens(text, prepend_bos=False)
        expected = gpt2_run(ids)[0]
        torch.testing.assert_close(found["model"](ids).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found["bridge"](ids), expected, atol=1e-4, rtol=0)
    with found["traced"].trace(text):
        logits = found["traced"].output.logits.save()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    (written,) = found["generate"](text, max_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith(text)


def test_the_lines_of_a_form_without_tokenizer_take_token_ids(run, bare_run):
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    found = run_lines("out/mine/hf")
    ids = torch.randint(0, 299, (1, 20))
    with torch.no_grad():
        expected = bare_run(ids)[0]
        torch.testing.assert_close(found["bridge"](ids), expected, atol=1e-4, rtol=0)
    with found["traced"].trace(ids):
        logits = found["traced"].output.logits.save()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_lines_of_the_folded_form_open_it(run, bare_run):
    """Those for TransformerLens 3 are run by `make test-tl3`."""
    assert run("tools.export", "out/mine", "--to=folded").code == 0
    assert head("out/mine/folded").library_name is None  # transformers can't open it
    found = run_lines("out/mine/folded", until="from export import to_hooked")
    ids = torch.randint(0, 299, (1, 20))
    with torch.no_grad(), found["traced"].trace(ids):
        logits = found["traced"].output[0].save()
    torch.testing.assert_close(logits, bare_run(ids)[0], atol=1e-4, rtol=0)


# --- the hub's metadata


def head(directory):
    return hub.ModelCard.load(directory + "/README.md").data


def write_run(**settings):
    with open("out/mine/settings.json", "w") as f:
        json.dump(settings | dict(ln_schedule=[], run="0123456789abcdef"), f)
    write_table("out/mine/eval.json", weights_sha256(GPT.from_pretrained("out/mine/model")))


def write_table(path, sha256):
    rows = [
        dict(dataset="owt", role="control", loss=2.989, loss_se=0.002, gap=None),
        dict(dataset="owt", role="ln_free", loss=3.014, loss_se=0.002, gap=0.025, gap_se=0.001),
    ]
    with open(path, "w") as f:
        json.dump(dict(rows=rows, weights_sha256={"out/mine": sha256}), f)


def test_base_model_license_data_and_loss_stand_in_the_hubs_own_fields(gpt2_run, tmp_path):
    """The license is the original's, from its card on the hub."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/README.md").write_text("---\nlicense: mit\n---\n# GPT-2\n")
    os.makedirs("data/owt")
    with open("data/owt/meta.json", "w") as f:
        json.dump(dict(source="Skylion007/openwebtext train"), f)
    write_run(init_from="gpt2@main", dataset="owt")
    with serve({"openai-community/gpt2": tmp_path / "repo"}) as server:
        env = server.env | {"HF_HOME": str(tmp_path / "cache")}
        done = run_alone("tools.export", "out/mine", "--to=hf", env=env)
    assert done.code == 0, done.text
    data = head("out/mine/hf")
    assert data.base_model == "openai-community/gpt2"
    assert data.license == "mit"
    assert data.datasets == ["Skylion007/openwebtext"]
    assert data.library_name == "transformers"
    assert data.metrics == ["cross-entropy"]
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("Skylion007/openwebtext", "owt")
    assert (result.metric_type, result.metric_value) == ("cross-entropy", 3.014)


def test_of_a_model_and_text_of_ones_own_the_card_says_what_is_known(run, bare_run, tmp_path):
    """A license beside the original; no base_model and no data set, which the hub would look for."""
    (tmp_path / "hf/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    os.makedirs("data/text")
    with open("data/text/meta.json", "w") as f:
        json.dump(dict(source="texts/*.txt"), f)
    write_run(init_from=str(tmp_path / "hf"), dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    data = head("out/mine/hf")
    assert data.license == "apache-2.0"
    assert data.base_model is None
    assert data.datasets is None


@pytest.mark.parametrize("row", [
    dict(dataset=5, role="ln_free", loss="3.0", loss_se=1),
    dict(role="ln_free", loss=3.0),
    5,
])
def test_an_evaluation_that_is_none_is_left_out(run, bare_run, row):
    with open("out/mine/eval.json", "w") as f:
        json.dump(dict(rows=[row]), f)
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    with open("out/mine/hf/README.md") as f:
        assert "Its evaluation: not measured." in f.read()


def test_an_evaluation_of_other_weights_is_left_out_and_said_so(run, bare_run):
    """As it stays in the folder of a run that was repeated with --force."""
    write_run(init_from="gpt2", dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    with open("out/mine/hf/README.md") as f:
        text = f.read()
    assert "3.0140 ± 0.0020 | +0.0250 ± 0.0010" in text
    assert "Settings of the run 0123456789abcdef:" in text
    write_table("out/mine/eval.json", "0" * 64)
    done = run("tools.export", "out/mine", "--to=hf", "--out=again")
    assert "the card has no evaluation: out/mine/eval.json is of other weights" in done.text
    with open("again/README.md") as f:
        assert "Its evaluation: not measured." in f.read()


@pytest.mark.parametrize("card", [
    "---\nlicense: [mit\n---\n",
    "no head",
    "---\n5\n---\n",
])
def test_of_a_card_that_can_not_be_read_the_license_is_left_out(run, bare_run, tmp_path, card):
    (tmp_path / "hf/README.md").write_text(card)
    write_run(init_from=str(tmp_path / "hf"), dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    assert head("out/mine/hf").license is None


def test_without_a_network_the_license_is_left_out(run, bare_run):
    write_run(init_from="gpt2", dataset="gone")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    data = head("out/mine/hf")
    assert data.base_model == "openai-community/gpt2"
    assert data.license is None
