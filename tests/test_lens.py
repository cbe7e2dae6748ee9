"""
tools/lens.py: without LayerNorm the contributions sum up to the logit, and ablating a component takes away just its
contribution. With LN they sum up while the std is held, but ablation has another effect.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_hf
from transformers import AutoModelForCausalLM

from model import GPT
from tools import lens

PROMPT = "def read(self, size=-1):\n    return self.buffer.re"
IDS = torch.tensor(list(PROMPT.encode()))


@pytest.fixture
def original():
    return GPT.from_pretrained(TINY).eval()


def test_the_components_are_what_transformers_adds_to_the_stream(original):
    """Embeddings, each layer's attention, of heads and bias, and each layer's MLP."""
    hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
    added = {}
    for block in hf.transformer.h:
        block.attn.register_forward_hook(lambda attn, args, out: added.update({attn: out[0][0, -1]}))
        block.mlp.register_forward_hook(lambda mlp, args, out: added.update({mlp: out[0, -1]}))
    with torch.no_grad():
        hf(IDS[None])
    found = lens.components_of(original, IDS)
    torch.testing.assert_close(found["token embedding"], hf.transformer.wte.weight[IDS[-1]])
    torch.testing.assert_close(found["position embedding"], hf.transformer.wpe.weight[len(IDS) - 1])
    for i, block in enumerate(hf.transformer.h):
        attention = sum(found[f"h.{i} head {head}"] for head in range(6)) + found[f"h.{i} attention bias"]
        torch.testing.assert_close(attention, added[block.attn], atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"h.{i} MLP"], added[block.mlp], atol=1e-4, rtol=0)


def assert_sums_to_the_logit(model):
    """The logit lens ends there, too. Returns {component: (contribution, effect of its ablation)}, and the logit."""
    components = lens.components_of(model, IDS)
    found, bias, logit = lens.attribute(model, components, 97)
    with torch.no_grad():
        logits = model(IDS[None])[0][0, -1]
    expected = pytest.approx(logits[97].item(), abs=1e-4)
    assert logit == expected
    assert sum(contribution for contribution, _ in found.values()) + bias == expected
    layers = lens.logit_lens(model, components, 97)
    assert [name for name, _, _ in layers] == ["embedding", "h.0", "h.1", "h.2", "h.3"]
    assert layers[-1][1:] == (expected, logits.argmax())
    return found, logit


def test_without_layernorm_contributions_sum_to_the_logit_and_are_the_effect_of_ablation(removed):
    found, _ = assert_sums_to_the_logit(removed.fold())
    for name, (contribution, effect) in found.items():
        assert effect == pytest.approx(contribution, abs=1e-4), name


def test_with_layernorm_contributions_sum_to_the_logit_but_are_not_the_effect_of_ablation(original):
    """The effect is computed here from the stream without the component, by the formula of LayerNorm."""
    found, logit = assert_sums_to_the_logit(original)
    components = lens.components_of(original, IDS)
    ln_f, row = original.transformer.ln_f, original.lm_head.weight[97].double()
    x = sum(components.values()).double() - components["h.3 MLP"].double()
    y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * ln_f.weight.double() + ln_f.bias.double()
    contribution, effect = found["h.3 MLP"]
    assert effect == pytest.approx(logit - (row @ y).item(), abs=1e-3)
    assert abs(contribution - effect) > 0.5


@pytest.fixture
def mine(removed, tmp_path):
    """The folder of a run that removed it from TINY."""
    removed.save_pretrained(tmp_path / "mine/model")
    (tmp_path / "mine/settings.json").write_text(json.dumps(dict(init_from=TINY, ln_schedule=[], dataset="stdlib")))


def test_a_table_and_a_picture_of_a_run(run, mine):
    done = run("tools.lens", "mine", f"--prompt={PROMPT}", "--top=5", "--out=lens.png")
    assert done.code == 0, done.text
    sums, logits = (re.search(rf"^{line} +(\S+) +(\S+)$", done.text, re.MULTILINE).groups()
                    for line in ("sum", "the logit itself"))
    assert [float(n) for n in sums] == pytest.approx([float(n) for n in logits], abs=2e-4)
    assert max(map(len, done.text.splitlines())) <= 80
    assert Path("lens.png").read_bytes().startswith(b"\x89PNG")
    named = run("tools.lens", "mine", f"--prompt={PROMPT}", "--token=x", "--out=x.png")
    assert named.text.startswith("the logit of 'x' after")


@pytest.mark.parametrize("args, named", [
    ([], "tools.lens"),
    ([TINY, "--prompt=a"], "h.0.ln_1qk"),
    (["mine"], "--prompt"),
    (["mine", "--prompt=" + 300 * "a"], "300 tokens"),
    (["mine", "--prompt=a", "--token=ab"], "--token='ab'"),
    (["mine", "--prompt=a", "--original=other"], "other"),
    (["mine", "--prompt=a", "--original=mine"], "mine"),
    (["mine", "--prompt=a", "--out=lens.xyz"], "lens.xyz"),
    (["mine", "--prompt=a", "--out=notes.png"], "notes.png exists"),
    (["mine/model", "--prompt=a"], "--original"),
])
def test_bad_input_ends_in_one_line(run, mine, args, named):
    random_hf().save_pretrained("other")
    open("notes.png", "w").close()
    assert named in run("tools.lens", *args).error
