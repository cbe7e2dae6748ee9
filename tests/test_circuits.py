"""
tools/circuits.py: every sum is what the model itself computes, in float64, without LayerNorm; and circuits of weights
are those of the matrices written out.
"""
import math
import os

import pytest
import torch
from conftest import TINY, without_layernorm

from model import GPT, GPTConfig
from tools import circuits


@pytest.fixture(scope="module")
def free():
    """The bundled model without LayerNorm, folded, in float64."""
    torch.manual_seed(0)
    return without_layernorm(TINY).double().fold()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (40,))


def seen(model, ids):
    """{module: its input or output (T, ...)} of a forward pass, by hooks."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_fc", "lm_head")):
            hooks.append(module.register_forward_hook(
                lambda module, args, out, name=name: found.update({name: (args[0][0], out[0])})))
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    return found


def test_what_is_written_sums_up_to_the_stream_before_every_reader_and_what_is_read_to_its_value(free, ids):
    written = circuits.components(free, ids)
    assert len(written.names) == len(set(written.names)) == 2 + 4 * (free.config.n_head + 3)
    inside = seen(free, ids)
    for name, reader in circuits.readers(free).items():
        layer, _, kind = name.rpartition(" ")
        module = {"neurons": "mlp.c_fc", "logits": "lm_head"}.get(kind, "attn.c_attn")
        stream, out = inside[f"transformer.{layer}.{module}" if layer else module]
        torch.testing.assert_close(written.stream(reader), stream, atol=1e-10, rtol=0)
        at = ("queries", "keys", "values").index(kind) if module == "attn.c_attn" else 0
        out = out.chunk(3, -1)[at] if module == "attn.c_attn" else out
        total = circuits.contributions(written, reader).sum(0) + reader.bias
        torch.testing.assert_close(total, out, atol=1e-10, rtol=0)


def test_with_layernorm_the_sums_hold_with_the_std_held_and_ablation_differs(ids):
    model = GPT.from_pretrained(TINY).double().eval()
    written, logits = circuits.components(model, ids), circuits.readers(model)["logits"]
    found = circuits.contributions(written, logits)
    with torch.no_grad():
        expected = model(ids[None])[0][0]
        torch.testing.assert_close(found.sum(0) + logits.bias, expected, atol=1e-10, rtol=0)
        k = written.names.index("h.3 MLP")
        without = model.lm_head(model.transformer.ln_f(written.stream(logits) - written.writes[k], torch.tensor(False)))
    assert (expected - without - found[k]).abs().max() > 0.5


def test_attention_scores_are_sums_over_pairs_of_components(free, ids):
    _, out = seen(free, ids)["transformer.h.2.attn.c_attn"]
    d = free.config.n_embd // free.config.n_head
    q, k, _ = (part[:, d : 2 * d] for part in out.chunk(3, -1))
    scores = circuits.attention_scores(free, ids, 2, 1)
    torch.testing.assert_close(scores.total(), q @ k.T / math.sqrt(d), atol=1e-10, rtol=0)
    pairs = scores.pairs(20, 7)
    assert pairs.shape == (len(scores.names),) * 2
    assert pairs.sum().item() == pytest.approx((q[20] @ k[7]).item() / math.sqrt(d), abs=1e-10)
    i, j = scores.names.index("h.0 MLP"), scores.names.index("bias")
    written = circuits.components(free, ids)
    W_q = free.transformer.h[2].attn.c_attn.weight[d : 2 * d]
    b_k = free.transformer.h[2].attn.c_attn.bias[free.config.n_embd :][d : 2 * d]
    by_hand = (W_q @ written.writes[i, 20]) @ b_k / math.sqrt(d)
    assert pairs[i, j].item() == pytest.approx(by_hand.item(), abs=1e-10)


def test_one_path_that_is_patched_is_the_model_run_with_that_path_alone_replaced(free, ids):
    """By hooks: the MLP of layer 3 sees a stream in which head 2 of layer 1 wrote what it writes on other tokens."""
    other = torch.randint(0, 256, ids.shape)
    d = free.config.n_embd // free.config.n_head
    z = {}

    def see(c_proj, args):
        z[len(z)] = args[0][0, :, 2 * d : 3 * d]

    hook = free.transformer.h[1].attn.c_proj.register_forward_pre_hook(see)
    with torch.no_grad():
        free(ids[None])
        free(other[None])
    hook.remove()
    change = (z[1] - z[0]) @ free.transformer.h[1].attn.c_proj.weight[:, 2 * d : 3 * d].T
    fc, found = free.transformer.h[3].mlp.c_fc, []
    hooks = [fc.register_forward_pre_hook(lambda module, args: (args[0] + change,)),
             fc.register_forward_hook(lambda module, args, out: found.append(out[0]))]
    with torch.no_grad():
        free(ids[None])
    for hook in hooks:
        hook.remove()
    neurons = circuits.readers(free)["h.3 neurons"]
    patched = circuits.direct_path_patch(free, ids, other, "h.1 head 2", neurons)
    torch.testing.assert_close(patched, found[0], atol=1e-10, rtol=0)
    assert (patched - circuits.direct_path_patch(free, ids, ids, "h.1 head 2", neurons)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="h.3 MLP"):
        circuits.direct_path_patch(free, ids, other, "h.3 MLP", neurons)


def test_the_circuits_of_a_head_give_its_scores_and_its_output(free, ids):
    written, values = circuits.components(free, ids), circuits.readers(free)["h.2 values"]
    x = written.stream(values)
    scores = circuits.qk(free, 2, 1).score(x, x)
    torch.testing.assert_close(scores, circuits.attention_scores(free, ids, 2, 1).total(), atol=1e-10, rtol=0)
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(future, -math.inf).softmax(-1)
    output = pattern @ circuits.ov(free, 2, 1).write(x)
    torch.testing.assert_close(output, written.writes[written.names.index("h.2 head 1")], atol=1e-10, rtol=0)


def test_token_circuits_are_those_of_the_matrices_written_out(free):
    a, b = torch.tensor([5, 6, 7]), torch.tensor([10, 200])
    E, U = free.transformer.wte.weight, free.lm_head.weight
    head, C = free.transformer.h[1].attn, free.config.n_embd
    d = C // free.config.n_head
    rows = slice(3 * d, 4 * d)
    W_q, W_k, W_v = (W[rows] for W in head.c_attn.weight.chunk(3))
    b_q, b_k, b_v = (bias[rows] for bias in head.c_attn.bias.chunk(3))
    by_hand = (E @ W_q.T + b_q) @ (E @ W_k.T + b_k).T / math.sqrt(d)
    torch.testing.assert_close(circuits.token_scores(free, 1, 3, a, b), by_hand[a][:, b])
    by_hand = (E @ W_v.T + b_v) @ head.c_proj.weight[:, rows].T @ U.T
    torch.testing.assert_close(circuits.token_logits(free, 1, 3, a, b), by_hand[a][:, b])


def test_composition_is_that_of_whole_matrices(free):
    scores = circuits.composition(free)
    C, H = free.config.n_embd, free.config.n_head
    d = C // H

    def matrices(layer, head):
        attn, rows = free.transformer.h[layer].attn, slice(head * d, head * d + d)
        W_q, W_k, W_v = (W[rows] for W in attn.c_attn.weight.chunk(3))
        return W_v.T @ attn.c_proj.weight[:, rows].T, W_q.T @ W_k  # (C, C) each, for rows x: x OV, x QK y

    A, _ = matrices(0, 1)
    B_ov, B_qk = matrices(2, 3)
    for kind, B in dict(Q=B_qk, K=B_qk.T, V=B_ov).items():
        expected = (A @ B).norm() / (A.norm() * B.norm())
        assert scores[kind][0, 1, 2, 3].item() == pytest.approx(expected.item(), rel=1e-9)
        assert scores[kind][2].eq(0)[:, :3].all()  # no composition with the same layer or an earlier one


def test_random_heads_compose_as_chance_says():
    config = GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=4, n_embd=256, eot=0, folded=True)
    scores = circuits.composition(GPT(config))
    for kind in "QKV":
        assert scores[kind][0, :, 1].mean().item() == pytest.approx(1 / math.sqrt(256), rel=0.05)


def test_copying_is_the_share_of_positive_eigenvalues_in_the_space_of_tokens(free):
    E, U = free.transformer.wte.weight, free.lm_head.weight
    C, H = free.config.n_embd, free.config.n_head
    rows = slice(C // H, 2 * C // H)
    attn = free.transformer.h[2].attn
    whole = U @ attn.c_proj.weight[:, rows] @ attn.c_attn.weight[2 * C :][rows] @ E.T
    eigenvalues = torch.linalg.eigvals(whole)
    expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
    assert circuits.copying(free)[2, 1].item() == pytest.approx(expected.item(), abs=1e-3)


def test_patterns_are_transformers_attentions():
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(TINY, attn_implementation="eager").eval()
    half = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([half, half])
    with torch.no_grad():
        expected = torch.cat(hf(ids[None], output_attentions=True).attentions)  # (L, heads, T, T)
    tiny = GPT.from_pretrained(TINY).eval()
    torch.testing.assert_close(circuits.patterns(tiny, ids), expected, atol=1e-5, rtol=0)
    matching = sum(expected[:, :, i, i - 49] for i in range(50, 100)) / 50
    torch.testing.assert_close(circuits.prefix_matching(tiny, 50, seed=3), matching, atol=1e-5, rtol=0)


def test_a_random_sequence_is_of_many_tokens_wherever_end_of_text_is():
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=8, eot=0, folded=True))
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert circuits.prefix_matching(model).shape == (1, 2)
    assert 0 not in seen[0]
    assert len(seen[0].unique()) > 4


def test_connections_of_a_neuron_and_a_head_are_products_of_their_weights(free):
    mlp1, mlp3, head2 = free.transformer.h[1].mlp, free.transformer.h[3].mlp, free.transformer.h[2].attn
    C, d = free.config.n_embd, free.config.n_embd // free.config.n_head
    found = circuits.connections(free, "h.1 neuron 5")
    written, read = mlp1.c_proj.weight[:, 5], mlp1.c_fc.weight[5]
    for name, weight in found["to neurons"]:
        layer, k = int(name[2]), int(name.split()[-1])
        assert weight == pytest.approx((free.transformer.h[layer].mlp.c_fc.weight[k] @ written).item(), abs=1e-12)
    largest = max((block.mlp.c_fc.weight @ written).abs().max().item() for block in free.transformer.h[2:])
    assert abs(found["to neurons"][0][1]) == pytest.approx(largest)
    assert abs(found["to logits"][0][1]) == pytest.approx((free.lm_head.weight @ written).abs().max().item())
    assert abs(found["from tokens"][0][1]) == pytest.approx((free.transformer.wte.weight @ read).abs().max().item())

    found = circuits.connections(free, "h.2 head 1", n=10**9)
    W_o, W_q = head2.c_proj.weight[:, d : 2 * d], head2.c_attn.weight[d : 2 * d]
    weights = dict(found["to neurons"])
    assert weights["h.3 neuron 7"] == pytest.approx((mlp3.c_fc.weight[7] @ W_o).norm().item())
    assert weights["h.2 neuron 7"] > 0  # the MLP of its own layer reads it
    assert dict(found["from neurons"])["query reads h.1 neuron 5"] == pytest.approx((W_q @ written).norm().item())
    W_v3 = free.transformer.h[3].attn.c_attn.weight[2 * C :][:d]
    assert dict(found["to heads"])["h.3 head 0 value"] == pytest.approx((W_v3 @ W_o).norm().item())


@pytest.mark.parametrize("name", ["h.1 neuron 768", "h.4 head 0", "h.1 head 6", "mlp 3", ""])
def test_a_name_that_the_model_does_not_have_is_refused(free, name):
    with pytest.raises(ValueError):
        circuits.connections(free, name)


def test_a_model_with_layernorms_left_is_refused():
    model = GPT.from_pretrained(TINY)
    model.set_ln_mode("ln_2", 1, "fake")
    with pytest.raises(ValueError):
        circuits.readers(model)


def test_a_page_on_a_run_and_a_refusal(run):
    without_layernorm(TINY).save_pretrained("mine/model")
    done = run("tools.circuits", "mine", "--top=3")
    assert done.code == 0, done.text
    assert os.path.getsize("mine/circuits.png") > 10_000
    scores = circuits.composition(GPT.from_pretrained("mine/model").fold())
    assert f"{max(kind.max().item() for kind in scores.values()):.3f}" in done.text
    assert "h.0.ln_1qk" in run("tools.circuits", TINY).error
