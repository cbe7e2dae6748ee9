"""
tools/lens.py: without LayerNorm the contributions sum up to the logit, and ablating a component takes away just its
contribution. With LN they sum up while the std is held, but ablation has another effect.
"""
import os
import re

import pytest
import torch
from conftest import TINY, random_hf

from model import GPT
from tools import lens

PROMPT = "def read(self, size=-1):\n    return self.buffer.re"


@pytest.fixture
def ids():
    return torch.tensor(list(PROMPT.encode()))


@pytest.fixture
def free(ln_free_run):
    return GPT.from_pretrained(ln_free_run + "/model").eval().fold()


@pytest.fixture
def original():
    return GPT.from_pretrained(TINY).eval()


def test_the_components_are_what_transformers_adds_to_the_stream(original, ids):
    """Embeddings, each layer's attention, of heads and bias, and each layer's MLP."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
    added = {}

    def see(name):
        def hook(module, args, out):
            added[name] = (out[0] if isinstance(out, tuple) else out)[0, -1]

        return hook

    for i, block in enumerate(hf.transformer.h):
        block.attn.register_forward_hook(see(f"h.{i} attention"))
        block.mlp.register_forward_hook(see(f"h.{i} MLP"))
    with torch.no_grad():
        hf(ids[None])
    found = lens.components_of(original, ids)
    assert len(found) == 2 + 4 * (6 + 1 + 1)
    torch.testing.assert_close(found["token embedding"], hf.transformer.wte.weight[ids[-1]])
    torch.testing.assert_close(found["position embedding"], hf.transformer.wpe.weight[len(ids) - 1])
    for i in range(4):
        heads = sum(found[f"h.{i} head {head}"] for head in range(6))
        attention = heads + found[f"h.{i} attention bias"]
        torch.testing.assert_close(attention, added[f"h.{i} attention"], atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"h.{i} MLP"], added[f"h.{i} MLP"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [97, 10])
def test_without_layernorm_contributions_sum_to_the_logit_and_are_the_effect_of_ablation(free, ids, target):
    found, bias, logit = lens.attribute(free, lens.components_of(free, ids), target)
    with torch.no_grad():
        expected = free(ids[None])[0][0, -1, target].item()
    assert logit == pytest.approx(expected, abs=1e-4)
    assert sum(contribution for contribution, _ in found.values()) + bias == pytest.approx(expected, abs=1e-4)
    for name, (contribution, effect) in found.items():
        assert effect == pytest.approx(contribution, abs=1e-4), name


def test_with_layernorm_contributions_sum_to_the_logit_but_are_not_the_effect_of_ablation(original, ids):
    """The effect is computed here from the stream without the component, by the formula of LayerNorm."""
    components = lens.components_of(original, ids)
    found, bias, logit = lens.attribute(original, components, 97)
    with torch.no_grad():
        expected = original(ids[None])[0][0, -1, 97].item()
    assert logit == pytest.approx(expected, abs=1e-4)
    assert sum(contribution for contribution, _ in found.values()) + bias == pytest.approx(expected, abs=1e-4)

    ln_f, row = original.transformer.ln_f, original.lm_head.weight[97].double()
    x = sum(components.values()).double() - components["h.3 MLP"].double()
    y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * ln_f.weight.double() + ln_f.bias.double()
    contribution, effect = found["h.3 MLP"]
    assert effect == pytest.approx(expected - (row @ y).item(), abs=1e-3)
    assert abs(contribution - effect) > 0.5


def test_the_logit_lens_ends_with_the_models_own_logit(free, original, ids):
    for model in (free, original):
        layers = lens.logit_lens(model, lens.components_of(model, ids), 97)
        assert [name for name, _, _ in layers] == ["embedding", "h.0", "h.1", "h.2", "h.3"]
        with torch.no_grad():
            logits = model(ids[None])[0][0, -1]
        _, logit, likeliest = layers[-1]
        assert logit == pytest.approx(logits[97].item(), abs=1e-4)
        assert likeliest == logits.argmax()


def test_a_table_and_a_picture_of_a_run(run, ln_free_run):
    os.symlink(ln_free_run, "mine")
    done = run("tools.lens", "mine", f"--prompt={PROMPT}", "--top=5", "--out=lens.png")
    assert done.code == 0, done.text
    sums = re.search(r"^sum +(\S+) +(\S+)$", done.text, re.MULTILINE)
    logits = re.search(r"^the logit itself +(\S+) +(\S+)$", done.text, re.MULTILINE)
    assert [float(n) for n in sums.groups()] == pytest.approx([float(n) for n in logits.groups()], abs=2e-4)
    assert "29 more components" in done.text
    assert max(map(len, done.text.splitlines())) <= 80
    with open("lens.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    named = run("tools.lens", "mine", f"--prompt={PROMPT}", "--token=x", "--out=x.png")
    assert named.text.startswith("the logit of 'x' after")


@pytest.mark.parametrize("args, named", [
    ([], "usage: python -m tools.lens"),
    ([TINY, "--prompt=a"], "h.0.ln_1qk is still real"),
    (["mine"], "--prompt"),
    (["mine", "--prompt=" + 300 * "a"], "300 tokens"),
    (["mine", "--prompt=a", "--token=ab"], "--token='ab'"),
    (["mine", "--prompt=a", "--original=other"], "other has another vocabulary"),
    (["mine", "--prompt=a", "--original=mine"], "mine is not an original"),
    (["mine", "--prompt=a", "--out=lens.xyz"], "lens.xyz"),
    (["mine", "--prompt=a", "--out=notes.png"], "notes.png exists"),
    (["mine/model", "--prompt=a"], "--original"),
])
def test_bad_input_ends_in_one_line(run, ln_free_run, args, named):
    os.symlink(ln_free_run, "mine")
    random_hf().save_pretrained("other")
    open("notes.png", "w").close()
    assert named in run("tools.lens", *args).error
