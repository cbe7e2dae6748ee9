"""
parts/card.py: a model card's lines open the model when they are run as printed, and its head is what the hub reads.
"""
import json
import re
from pathlib import Path

import huggingface_hub as hub
import pytest
import torch
from conftest import random_hf, run_alone, without_layernorm
from tiny_hub import serve

from model import GPT
from parts.run import weights_sha256


def save_run(vocab_size=300):
    """hf, a random GPT-2, and out/mine, a run's folder with the same model, LN-free."""
    random_hf(vocab_size=vocab_size, n_layer=2).save_pretrained("hf")
    model = without_layernorm("hf")
    model.save_pretrained("out/mine/model")
    return model


def read_card(directory):
    return Path(directory, "README.md").read_text()


def run_lines(directory, until="```"):
    """The names that the card's Python leaves."""
    code = re.search(r"```python\n(.*?)```", read_card(directory), re.DOTALL)[1]
    names = {}
    exec(code.partition(until)[0], names)
    return names


def head(directory):
    return hub.ModelCard.load(directory + "/README.md").data


@pytest.mark.slow
def test_the_lines_of_the_plain_form_open_it_in_every_tool(run, gpt2_tokenizer):
    model = save_run(50257)
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


@pytest.mark.parametrize("to, library", [
    ("hf", "transformers"),
    ("folded", None),  # `make test-tl3` runs its lines for TransformerLens 3
])
def test_the_lines_of_a_form_without_tokenizer_take_token_ids(run, to, library):
    model = save_run()
    assert run("tools.export", "out/mine", f"--to={to}").code == 0
    assert head(f"out/mine/{to}").library_name == library
    found = run_lines(f"out/mine/{to}", until="from tools.export import to_hooked")
    ids = torch.randint(0, 299, (1, 20))
    with torch.no_grad():
        expected = model(ids)[0]
        with found["traced"].trace(ids):
            logits = found["traced"].output[0].save()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        if to == "hf":
            torch.testing.assert_close(found["bridge"](ids), expected, atol=1e-4, rtol=0)


def write_json(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content))


def write_run(sha256=None, **settings):
    """The settings of out/mine, and the table of its weights or of those with sha256."""
    write_json("out/mine/settings.json", settings | dict(ln_schedule=[], seed=1234))
    rows = [dict(dataset="owt", role="control", loss=2.989, loss_se=0.002, gap=None),
            dict(dataset="owt", role="ln_free", loss=3.014, loss_se=0.002, gap=0.025, gap_se=0.001)]
    sha256 = sha256 or weights_sha256(GPT.from_pretrained("out/mine/model"))
    write_json("out/mine/eval.json", dict(rows=rows, weights_sha256={"out/mine": sha256}))


def test_base_model_license_data_and_loss_stand_in_the_hubs_own_fields(run, tmp_path):
    """The license is the original's, from its card on the hub."""
    save_run()
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/README.md").write_text("---\nlicense: mit\n---\n# GPT-2\n")
    write_json("data/owt/meta.json", dict(source="Skylion007/openwebtext train"))
    write_run(init_from="gpt2@main", dataset="owt")
    with serve({"openai-community/gpt2": tmp_path / "repo"}) as server:
        env = server.env | {"HF_HOME": str(tmp_path / "cache")}
        done = run_alone("tools.export", "out/mine", "--to=hf", env=env)
    assert done.code == 0, done.text
    data = head("out/mine/hf")
    expected = ("openai-community/gpt2", "mit", ["Skylion007/openwebtext"])
    assert (data.base_model, data.license, data.datasets) == expected
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("Skylion007/openwebtext", "owt")
    assert (result.metric_type, result.metric_value) == ("cross-entropy", 3.014)


@pytest.mark.parametrize("card, license", [
    ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
    ("---\nlicense: [mit\n---\n", None),
    ("no head", None),
])
def test_of_a_model_and_text_of_ones_own_the_card_has_what_is_known(run, tmp_path, card, license):
    """The license in the card beside the original; no base_model and no data set, which the hub would look for."""
    save_run()
    (tmp_path / "hf/README.md").write_text(card)
    write_json("data/text/meta.json", dict(source="texts/*.txt"))
    write_run(init_from=str(tmp_path / "hf"), dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    data = head("out/mine/hf")
    assert (data.license, data.base_model, data.datasets) == (license, None, None)


def test_the_evaluation_is_shown_if_it_is_of_these_weights(run):
    """That of other weights stays in the folder of a run that was repeated with --force. Without a network, the
    license is left out."""
    save_run()
    write_run(init_from="gpt2", dataset="text")
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    assert "| owt | LN-free | 3.0140 ± 0.0020 | +0.0250 ± 0.0010 |" in read_card("out/mine/hf")
    assert "seed = 1234" in read_card("out/mine/hf")
    assert (head("out/mine/hf").base_model, head("out/mine/hf").license) == ("openai-community/gpt2", None)

    write_run("0" * 64, init_from="gpt2", dataset="text")
    assert "note: " in run("tools.export", "out/mine", "--to=folded").text
    assert "3.0140" not in read_card("out/mine/folded")
