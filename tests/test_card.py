"""
The model card of an export: its lines of Python open the model as they are printed, and the hub reads its head.
"""
import json
import os
import re
from pathlib import Path

import huggingface_hub as hub
import pytest
import torch
from conftest import random_hf, run_alone, set_all_fake
from tiny_hub import serve

from model import GPT
from parts.run import weights_sha256


@pytest.fixture
def bare_run(tmp_path, run):
    """An LN-free random model of 300 ids and no tokenizer, as a run leaves it."""
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


@pytest.mark.slow
def test_the_lines_of_the_plain_form_open_it_in_every_tool(tmp_path, run, gpt2_tokenizer):
    model = save_run(tmp_path, random_hf(vocab_size=50257))
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    found = run_lines("out/mine/hf")

    text = "Once upon a time"
    with torch.no_grad():
        ids = found["bridge"].to_tokens(text, prepend_bos=False)
        expected = model(ids)[0]
        torch.testing.assert_close(found["model"](ids).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(found["bridge"](ids), expected, atol=1e-4, rtol=0)
    with found["traced"].trace(text):
        logits = found["traced"].output.logits.save()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    (written,) = found["generate"](text, max_new_tokens=4, do_sample=False)
    assert written["generated_text"].startswith(text)


@pytest.mark.parametrize("to", ["hf", "folded"])
def test_the_lines_of_a_model_without_tokenizer_take_token_ids(run, bare_run, to):
    """The folded form's line for TransformerLens 3 is left out: it needs an environment of its own."""
    assert run("tools.export", "out/mine", f"--to={to}").code == 0
    found = run_lines(f"out/mine/{to}", until="from tools.export import to_hooked")
    ids = torch.randint(0, 299, (1, 20))
    with torch.no_grad():
        expected = bare_run(ids)[0]
        if to == "hf":
            torch.testing.assert_close(found["bridge"](ids), expected, atol=1e-4, rtol=0)
        with found["traced"].trace(ids):
            logits = (found["traced"].output.logits if to == "hf" else found["traced"].output[0]).save()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert head(f"out/mine/{to}").library_name == ("transformers" if to == "hf" else None)


# --- the hub's metadata


def head(directory):
    return hub.ModelCard.load(directory + "/README.md").data


def table_of(directory):
    with open(directory + "/README.md") as f:
        return f.read().partition("```")[0]


def write_run(**settings):
    """The settings, and an evaluation of the run's own weights. Returns that."""
    sha256 = weights_sha256(GPT.from_pretrained("out/mine/model"))
    rows = [
        dict(dataset="owt", role="control", loss=2.989, loss_se=0.002, gap=None),
        dict(dataset="owt", role="ln_free", loss=3.014, loss_se=0.002, gap=0.025, gap_se=0.001),
    ]
    table = dict(rows=rows, weights_sha256={"out/mine": sha256})
    Path("out/mine/settings.json").write_text(json.dumps(settings | dict(ln_schedule=[])))
    Path("out/mine/eval.json").write_text(json.dumps(table))
    return table


def write_meta(dataset, source):
    os.makedirs(f"data/{dataset}")
    Path(f"data/{dataset}/meta.json").write_text(json.dumps(dict(source=source)))


def test_base_model_license_data_and_loss_stand_in_the_hubs_own_fields(bare_run, tmp_path):
    """The license is the original's, from its card on the hub."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/README.md").write_text("---\nlicense: mit\n---\n# GPT-2\n")
    write_meta("owt", "Skylion007/openwebtext train")
    write_run(init_from="gpt2@main", dataset="owt")
    with serve({"openai-community/gpt2": tmp_path / "repo"}) as server:
        done = run_alone("tools.export", "out/mine", "--to=hf", env=server.env | {"HF_HOME": str(tmp_path / "cache")})
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


# without a readable card the license is left out; None: the original is on the hub, and there is no network
@pytest.mark.parametrize("card, license", [
    ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
    ("---\nlicense: [mit\n---\n", None),
    ("no head", None),
    (None, None),
])
def test_of_a_model_and_text_of_ones_own_the_card_says_what_is_known(run, bare_run, tmp_path, card, license):
    """A license beside the original; no base_model and no data set, which the hub would look for."""
    if card:
        (tmp_path / "hf/README.md").write_text(card)
    write_meta("text", "texts/*.txt")
    write_run(init_from=str(tmp_path / "hf") if card else "gpt2", dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    data = head("out/mine/hf")
    assert data.license == license
    assert data.base_model == (None if card else "openai-community/gpt2")
    assert data.datasets is None


@pytest.mark.parametrize("broken", [dict(rows=[5]), dict(weights_sha256={"out/mine": "0" * 64})])
def test_an_evaluation_that_is_broken_or_of_other_weights_is_left_out(run, bare_run, broken):
    table = write_run(init_from="gpt2", dataset="text")
    assert run("tools.export", "out/mine").code == 0
    assert "3.0140 ± 0.0020 | +0.0250 ± 0.0010" in Path("out/mine/hf/README.md").read_text()
    Path("out/mine/eval.json").write_text(json.dumps(table | broken))
    assert "out/mine/eval.json" in run("tools.export", "out/mine", "--out=again").text
    assert "3.0140" not in Path("again/README.md").read_text()
