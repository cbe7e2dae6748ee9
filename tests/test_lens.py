"""
lens.py: an LN-free model's logit is the sum of what its parts contribute, and loses with a part just that
part's share; with LN it is the sum as long as the std is held, and loses something else.
"""
import os
import re

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


def test_the_parts_are_what_transformers_adds_to_the_stream(original, ids):
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
    parts = lens.parts_of(original, ids)
    assert len(parts) == 2 + 4 * (6 + 1 + 1)
    torch.testing.assert_close(parts["token embedding"], hf.transformer.wte.weight[ids[-1]])
    torch.testing.assert_close(parts["position embedding"], hf.transformer.wpe.weight[len(ids) - 1])
    for i in range(4):
        heads = sum(parts[f"h.{i} head {head}"] for head in range(6))
        attention = heads + parts[f"h.{i} attention bias"]
        torch.testing.assert_close(attention, added[f"h.{i} attention"], atol=1e-4, rtol=0)
        torch.testing.assert_close(parts[f"h.{i} MLP"], added[f"h.{i} MLP"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [97, 10])
def test_without_layernorm_shares_sum_to_the_logit_and_are_what_it_loses(free, ids, target):
    found, last, logit = lens.contributions(free, lens.parts_of(free, ids), target)
    with torch.no_grad():
        expected = free(ids[None])[0][0, -1, target].item()
    assert logit == pytest.approx(expected, abs=1e-4)
    assert sum(share for share, _ in found.values()) + last == pytest.approx(expected, abs=1e-4)
    for name, (share, lost) in found.items():
        assert lost == pytest.approx(share, abs=1e-4), name


def test_with_layernorm_shares_sum_to_the_logit_but_are_not_what_it_loses(original, ids):
    """What it loses is computed here from the stream without the part, by the formula of LayerNorm."""
    parts = lens.parts_of(original, ids)
    found, last, logit = lens.contributions(original, parts, 97)
    with torch.no_grad():
        expected = original(ids[None])[0][0, -1, 97].item()
    assert logit == pytest.approx(expected, abs=1e-4)
    assert sum(share for share, _ in found.values()) + last == pytest.approx(expected, abs=1e-4)

    ln_f, row = original.transformer.ln_f, original.lm_head.weight[97].double()
    x = sum(parts.values()).double() - parts["h.3 MLP"].double()
    y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * ln_f.weight.double() + ln_f.bias.double()
    share, lost = found["h.3 MLP"]
    assert lost == pytest.approx(expected - (row @ y).item(), abs=1e-3)
    assert abs(share - lost) > 0.5


def test_the_lens_ends_with_the_models_own_logit(free, original, ids):
    for model in (free, original):
        layers = lens.layer_by_layer(model, lens.parts_of(model, ids), 97)
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
    assert "29 more parts" in done.text
    assert max(map(len, done.text.splitlines())) <= 80
    with open("lens.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    named = run("tools.lens", "mine", f"--prompt={PROMPT}", "--token=x", "--out=lens.png")
    assert named.text.startswith("the logit of 'x' after")


@pytest.mark.parametrize("args, message", [
    ([], "usage: python -m tools.lens"),
    ([TINY, "--prompt=a"], "is not LN-free: h.0.ln_1qk is still real"),
    (["mine"], "a prompt is needed"),
    (["mine", "--prompt=" + 300 * "a"], "the prompt has 300 tokens, and the models see 256"),
    (["mine", "--prompt=a", "--token=ab"], "is 2 tokens, and a logit is of one"),
    (["mine", "--prompt=a", "--original=other"], "other has another vocabulary"),
    (["mine", "--prompt=a", "--original=mine"], "mine is no original"),
    (["mine", "--prompt=a", "--out=lens.xyz"], "lens.xyz does not end in .png, .pdf or .svg"),
    (["mine", "--prompt=a", "--out=none/lens.png"], "there is no directory none"),
    (["mine/model", "--prompt=a"], "no original to stand beside mine/model"),
])
def test_bad_input_ends_in_one_line(run, ln_free_run, args, message):
    os.symlink(ln_free_run, "mine")
    random_hf().save_pretrained("other")
    assert message in run("tools.lens", *args).error
