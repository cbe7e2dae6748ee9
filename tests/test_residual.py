"""
eval.py --dataset=residual: the stds and the attention sink are those of transformers' hidden states and attention
weights.
"""
import pytest
import torch
from conftest import TINY, even_windows, read_json

from model import GPT
from parts.residual import residual_stats


def std_before_a_site(x):
    """Residual stream (n, T, C) -> (n, T): what LayerNorm divides by."""
    return (x.var(-1, unbiased=False) + 1e-5).sqrt()


def test_residual_stds_and_the_sink_rate_against_transformers(run, stdlib):
    from transformers import AutoModelForCausalLM

    args = ["--dataset=stdlib,residual", "--tokens=1280", "--block_size=128", "--json=r.json"]
    done = run("eval.py", f"--models={TINY}", *args)
    row = read_json("r.json")["rows"][1]

    x = even_windows(10, 128)[:, :-1]
    hf = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager").eval()
    mlp_inputs = []
    for block in hf.transformer.h:
        block.ln_2.register_forward_pre_hook(lambda module, args: mlp_inputs.append(args[0]))
    with torch.no_grad():
        out = hf.transformer(x, output_hidden_states=True, output_attentions=True)
    streams = {}
    for i in range(4):
        streams[f"h.{i}.ln_1"] = out.hidden_states[i]
        streams[f"h.{i}.ln_2"] = mlp_inputs[i]

    later = torch.arange(128) > 0
    eot = (x == 256) & later
    others = (x != 256) & later
    for site, stream in streams.items():
        found = row["sites"][site]
        std = std_before_a_site(stream)
        assert found["position_0"]["mean"] == pytest.approx(std[:, 0].mean().item(), rel=1e-4)
        assert found["others"]["mean"] == pytest.approx(std[others].mean().item(), rel=1e-4)
        assert found["others"]["spread"] == pytest.approx(std[others].std(unbiased=False).item(), rel=1e-3)
        eot_tokens = found["eot"]["tokens"] if found["eot"] else 0
        assert eot_tokens == eot.sum()
    sinks = torch.stack(out.attentions)[:, :, :, 1:, 0] > 0.3  # (layers, n, heads, queries)
    assert row["sink_rate"] == pytest.approx(sinks.float().mean().item(), abs=1e-4)
    for label in ("attention sink rate", "h.3.ln_1 position 0", "ln_f others"):
        assert label in done.text


def test_folded_and_unfolded_models_have_the_same_residual_stream(finished):
    model = GPT.from_pretrained("out/demo/model").eval()
    x = even_windows(4, 64)[:, :-1]
    unfolded = residual_stats(model, [x])["sites"]
    folded = residual_stats(model.fold(), [x])["sites"]
    assert unfolded.keys() == folded.keys()
    assert len(unfolded) == 9
    for site in unfolded:
        expected = unfolded[site]["others"]["mean"]
        assert folded[site]["others"]["mean"] == pytest.approx(expected, rel=1e-3)
