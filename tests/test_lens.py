"""
lens.py: an LN-free model's logit is the sum of its components' contributions, and each one is the measured effect of
ablation. With LN the sum holds while the std is held, but the measured effects differ.
"""
import os
import re
import shutil

import pytest
import torch
from conftest import TINY, random_hf

from tools import lens
from model import GPT

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
    components = lens.components_of(original, ids)
    assert len(components) == 2 + 4 * (6 + 1 + 1)
    torch.testing.assert_close(components["token embedding"], hf.transformer.wte.weight[ids[-1]])
    torch.testing.assert_close(components["position embedding"], hf.transformer.wpe.weight[len(ids) - 1])
    for i in range(4):
        heads = sum(components[f"h.{i} head {head}"] for head in range(6))
        attention = heads + components[f"h.{i} attention bias"]
        torch.testing.assert_close(attention, added[f"h.{i} attention"], atol=1e-4, rtol=0)
        torch.testing.assert_close(components[f"h.{i} MLP"], added[f"h.{i} MLP"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [97, 10])
@pytest.mark.parametrize("which", ["free", "original"])
def test_contributions_sum_to_the_logit_and_without_layernorm_are_the_measured_effects(which, target, ids, request):
    model = request.getfixturevalue(which)
    found, bias, logit = lens.contributions(model, lens.components_of(model, ids), target)
    with torch.no_grad():
        expected = model(ids[None])[0][0, -1, target].item()
    assert logit == pytest.approx(expected, abs=1e-4)
    assert sum(contribution for contribution, _ in found.values()) + bias == pytest.approx(expected, abs=1e-4)
    if which == "free":
        for name, (contribution, effect) in found.items():
            assert effect == pytest.approx(contribution, abs=1e-4), name


def test_with_layernorm_the_measured_effect_is_that_of_layernorms_formula(original, ids):
    """The logit without a component, computed here from the stream without it."""
    components = lens.components_of(original, ids)
    found, _, logit = lens.contributions(original, components, 97)
    ln_f, row = original.transformer.ln_f, original.lm_head.weight[97].double()
    x = sum(components.values()).double() - components["h.3 MLP"].double()
    y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * ln_f.weight.double() + ln_f.bias.double()
    contribution, effect = found["h.3 MLP"]
    assert effect == pytest.approx(logit - (row @ y).item(), abs=1e-3)
    assert abs(contribution - effect) > 0.5


def test_the_lens_ends_with_the_models_own_logit(free, original, ids):
    for model in (free, original):
        layers = lens.logit_lens(model, lens.components_of(model, ids), 97)
        assert [name for name, _, _ in layers] == ["embedding", "h.0", "h.1", "h.2", "h.3"]
        with torch.no_grad():
            logits = model(ids[None])[0][0, -1]
        _, logit, likeliest = layers[-1]
        assert logit == pytest.approx(logits[97].item(), abs=1e-4)
        assert likeliest == logits.argmax()


def test_a_table_and_a_picture_of_a_run(run, ln_free_run):
    shutil.copytree(ln_free_run, "mine")
    done = run("tools.lens", "mine", f"--prompt={PROMPT}", "--top=5")
    assert done.code == 0, done.text
    sums = re.search(r"^sum +(\S+) +(\S+)$", done.text, re.MULTILINE)
    logits = re.search(r"^the logit itself +(\S+) +(\S+)$", done.text, re.MULTILINE)
    assert [float(n) for n in sums.groups()] == pytest.approx([float(n) for n in logits.groups()], abs=2e-4)
    assert "29 more" in done.text
    assert max(map(len, done.text.splitlines())) <= 80
    with open("mine/lens.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    named = run("tools.lens", "mine", f"--prompt={PROMPT}", "--token=x")
    assert named.text.startswith("the logit of 'x' after")


@pytest.mark.parametrize("args, named", [
    ([], "usage: python -m tools.lens"),
    ([TINY, "--prompt=a"], "h.0.ln_1qk"),
    (["mine"], "--prompt"),
    (["mine", "--prompt=" + 300 * "a"], "300 tokens, but needs 1 to 256"),
    (["mine", "--prompt=a", "--token=ab"], "--token='ab'"),
    (["mine", "--prompt=a", "--original=other"], "other"),
    (["mine", "--prompt=a", "--original=mine"], "mine"),
    (["mine", "--prompt=a", "--out=lens.xyz"], "lens.xyz"),
    (["mine", "--prompt=a", "--out=none/lens.png"], "none/lens.png"),
    (["mine/model", "--prompt=a", "--out=a.png"], "--original"),
])
def test_bad_input_ends_in_one_line(run, ln_free_run, args, named):
    os.symlink(ln_free_run, "mine")
    random_hf().save_pretrained("other")
    assert named in run("tools.lens", *args).error
