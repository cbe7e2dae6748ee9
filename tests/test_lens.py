"""
tools/lens.py: without LayerNorm the contributions sum up to what the model reads, a logit, a neuron or an attention
score, and ablating a component takes away just its contribution. With LN they sum up while the std is held, but
ablation has another effect.
"""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, random_hf
from transformers import AutoModelForCausalLM

from model import GPT
from parts.circuits import components
from tools import lens

PROMPT = "def read(self, size=-1):\n    return self.buffer.re"
IDS = torch.tensor(list(PROMPT.encode()))


@pytest.fixture
def original():
    return GPT.from_pretrained(TINY).eval()


def test_the_components_are_what_transformers_adds_to_the_stream(original):
    """Embeddings, each layer's attention, of heads and bias, and each layer's MLP and its bias."""
    hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
    added = {}
    for block in hf.transformer.h:
        block.attn.register_forward_hook(lambda attn, args, out: added.update({attn: out[0][0]}))
        block.mlp.register_forward_hook(lambda mlp, args, out: added.update({mlp: out[0]}))
    with torch.no_grad():
        hf(IDS[None])
    written = components(original, IDS)
    found = dict(zip(written.names, written.writes))
    torch.testing.assert_close(found["token embedding"], hf.transformer.wte.weight[IDS])
    torch.testing.assert_close(found["position embedding"], hf.transformer.wpe.weight[: len(IDS)])
    for i, block in enumerate(hf.transformer.h):
        attention = sum(found[f"h.{i} head {head}"] for head in range(6)) + found[f"h.{i} attention bias"]
        torch.testing.assert_close(attention, added[block.attn], atol=1e-4, rtol=0)
        torch.testing.assert_close(found[f"h.{i} MLP"] + found[f"h.{i} MLP bias"], added[block.mlp], atol=1e-4, rtol=0)


def assert_sums_to_the_logit(model):
    """The logit lens ends there, too. Returns {component: (contribution, effect of its ablation)}, and the logit."""
    found, bias, logit = lens.attribute(model, IDS, "logits", 97, len(IDS) - 1)
    with torch.no_grad():
        logits = model(IDS[None])[0][0, -1]
    expected = pytest.approx(logits[97].item(), abs=1e-4)
    assert logit == expected
    assert sum(contribution for contribution, _ in found.values()) + bias == expected
    layers = lens.logit_lens(model, IDS, len(IDS) - 1, 97)
    assert [name for name, _, _ in layers] == ["embedding", "h.0", "h.1", "h.2", "h.3"]
    assert layers[-1][1:] == (expected, logits.argmax())
    return found, logit


def test_without_layernorm_contributions_sum_to_what_is_read_and_are_the_effect_of_ablation(removed):
    free = removed.fold()
    found, _ = assert_sums_to_the_logit(free)
    neuron, bias, value = lens.attribute(free, IDS, "h.2 neurons", 7, 20)
    assert sum(contribution for contribution, _ in neuron.values()) + bias == pytest.approx(value, abs=1e-4)
    score, _, value = lens.attribute_score(free, IDS, 2, 1, 20, 7)
    assert sum(contribution for contribution, _ in score.values()) == pytest.approx(value, abs=1e-4)
    for name, (contribution, effect) in (found | neuron | score).items():
        assert effect == pytest.approx(contribution, abs=1e-4), name


def test_with_layernorm_contributions_sum_to_the_logit_but_are_not_the_effect_of_ablation(original):
    """The effect is computed here from the stream without the component, by the formula of LayerNorm."""
    found, logit = assert_sums_to_the_logit(original)
    written = components(original, IDS)
    ln_f, row = original.transformer.ln_f, original.lm_head.weight[97].double()
    x = (written.writes.sum(0) - written.writes[written.names.index("h.3 MLP")])[-1].double()
    y = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * ln_f.weight.double() + ln_f.bias.double()
    contribution, effect = found["h.3 MLP"]
    assert effect == pytest.approx(logit - (row @ y).item(), abs=1e-3)
    assert abs(contribution - effect) > 0.5


def test_with_layernorm_a_score_is_the_models_and_pairs_are_not_the_effect_of_ablation(original):
    """The effect of a pair: the score, less that without each side, plus that without both."""
    found, _, value = lens.attribute_score(original, IDS, 2, 1, 20, 7)
    assert sum(contribution for contribution, _ in found.values()) == pytest.approx(value, abs=1e-4)
    written = components(original, IDS)
    n, block, d = written.names.index("h.2 head 0"), original.transformer.h[2], 192 // 6

    def score(without_query, without_key):
        x = written.writes[:n].sum(0)[[20, 7]]
        a, b = (written.names.index(name) for name in ("h.0 MLP", "h.1 MLP"))
        x = torch.stack([x[0] - without_query * written.writes[a, 20], x[1] - without_key * written.writes[b, 7]])
        with torch.no_grad():
            q, k, _ = (part[:, d : 2 * d] for part in block.attn.c_attn(block.ln_1qk(x, None)).chunk(3, -1))
        return (q[0] @ k[1]).item() / math.sqrt(d)

    assert score(0, 0) == pytest.approx(value, abs=1e-4)
    contribution, effect = found["h.0 MLP", "h.1 MLP"]
    assert effect == pytest.approx(score(0, 0) - score(1, 0) - score(0, 1) + score(1, 1), abs=1e-3)
    assert abs(contribution - effect) > 1e-3


@pytest.fixture
def mine(removed, tmp_path):
    """The folder of a run that removed it from TINY."""
    removed.save_pretrained(tmp_path / "mine/model")
    (tmp_path / "mine/settings.json").write_text(json.dumps(dict(init_from=TINY, ln_schedule=[], dataset="stdlib")))


@pytest.mark.parametrize("of, what", [
    ([], "logit"),
    (["--of=logit:x", "--position=3"], "logit of 'x' after 'def '"),
    (["--of=h.2 neuron 700", "--position=0"], "value of h.2 neuron 700 at 'd' after 'd'"),
    (["--of=h.3 head 5: 12 -> 4"], "score"),
])
def test_a_table_and_a_picture_of_a_run(run, mine, of, what):
    done = run("tools.lens", "mine", f"--prompt={PROMPT}", "--top=5", *of)
    assert done.code == 0, done.text
    assert what in done.text.splitlines()[0]
    sums, read = (re.search(rf"^{line} +(\S+) +(\S+)$", done.text, re.MULTILINE).groups()
                  for line in ("sum", f"the {what.split()[0]} itself"))
    assert [float(n) for n in sums] == pytest.approx([float(n) for n in read], abs=2e-4)
    assert max(map(len, done.text.splitlines()[1:-1])) <= 80
    assert Path("mine/lens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args, named", [
    ([], "tools.lens"),
    ([TINY, "--prompt=a"], "h.0.ln_1qk"),
    (["mine"], "--prompt"),
    (["mine", "--prompt=" + 300 * "a"], "300 tokens"),
    (["mine", "--prompt=a", "--of=logit:ab"], "logit:ab"),
    (["mine", "--prompt=a", "--of=h.4 neuron 1"], "h.4 neuron 1"),
    (["mine", "--prompt=a", "--of=h.1 head 2"], "h.1 head 2"),
    (["mine", "--prompt=abc", "--of=h.1 head 2: 1 -> 2"], "1 -> 2"),
    (["mine", "--prompt=abc", "--of=h.1 head 2: 3 -> 0"], "3 -> 0"),
    (["mine", "--prompt=a", "--of=MLP"], "MLP"),
    (["mine", "--prompt=a", "--position=1"], "--position=1"),
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
