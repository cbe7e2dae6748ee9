"""
train.py's objective: the loss in pieces, KL to a teacher and the auxiliary loss, against transformers and autograd.
"""
import pytest
import torch
from conftest import TINY, objective_of, random_hf, set_all_fake
from torch import nn

from model import GPT
from parts.device import autocast_to


@pytest.fixture
def hf_and_ours(tmp_path):
    """hf_and_ours(seed=1): the same random weights as transformers' model and as ours."""

    def make(seed=0):
        hf = random_hf(seed)
        hf.save_pretrained(tmp_path / f"hf{seed}")
        return hf, GPT.from_pretrained(tmp_path / f"hf{seed}").eval()

    return make


@pytest.mark.parametrize("rows, compiled", [(190, False), (64, False), pytest.param(64, True, marks=pytest.mark.slow)])
def test_the_loss_in_pieces_has_the_plain_losss_value_and_gradients(hf_and_ours, monkeypatch, rows, compiled):
    """There are 2 x 95 tokens. In pieces of 64, the last piece is shorter."""
    hf, model = hf_and_ours()
    monkeypatch.setattr("parts.loss.LOSS_ROWS", rows)
    idx = torch.randint(0, 300, (2, 96))
    theirs = hf(idx, labels=idx).loss
    theirs.backward()
    ours, terms = objective_of(model.train(), compiled=compiled)(idx[:, :-1], idx[:, 1:])
    ours.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert terms == {"loss": ours}
    for ours, theirs in (
        (model.transformer.wte.weight.grad, hf.transformer.wte.weight.grad),
        (model.transformer.h[0].mlp.c_fc.weight.grad.T, hf.transformer.h[0].mlp.c_fc.weight.grad),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_folded_models_unembedding_bias_has_its_gradient():
    model = set_all_fake(GPT.from_pretrained(TINY)).fold().double()
    idx = torch.randint(0, 257, (2, 33))
    grads = []
    for loss in (objective_of(model)(idx[:, :-1], idx[:, 1:])[0], model(idx[:, :-1], idx[:, 1:])[1]):
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in (model.lm_head.bias, model.lm_head.weight)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("rows, share, noise", [(1024, 0.4, 0), (17, 0.4, 0), (17, 1.0, 0), (17, 0.4, 1)])
def test_kl_to_a_teacher_against_transformers_in_float64(hf_and_ours, monkeypatch, rows, share, noise):
    """The terms, and the gradient of their mixture, whole and in pieces. Noise is learned from by KL alone, a token of
    it as much as a token of text, and is in no term."""
    monkeypatch.setattr("parts.loss.LOSS_ROWS", rows)
    before, teacher = hf_and_ours(seed=1)
    hf, model = hf_and_ours(seed=2)
    idx, targets = torch.randint(0, 299, (2, 2, 30))
    targets[:noise] = -1
    with torch.no_grad():
        q = before.double()(idx).logits.log_softmax(-1)
    p = hf.double()(idx).logits.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1).mean(1)  # the mean of each sequence
    kl, of_both = kl[noise:].mean(), kl.sum() / (2 - noise)
    ce = nn.functional.nll_loss(p.flatten(0, 1), targets.flatten(), ignore_index=-1)
    ((1 - share) * ce + share * of_both).backward()

    objective = objective_of(model.double().train(), teacher.double().requires_grad_(False), kl_share=share)
    ours, terms = objective(idx, targets)
    (2 * ours).backward()  # a gradient that is not 1 reaches it
    assert terms["loss"].item() == pytest.approx(ce.item(), rel=1e-9)
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-9)
    assert ours.item() == pytest.approx((1 - share) * ce.item() + share * of_both.item(), rel=1e-9)
    assert kl.item() > 0.01
    for name in ("wte.weight", "h.0.mlp.c_fc.bias"):
        mine, theirs = (m.transformer.get_parameter(name).grad for m in (model, hf))
        torch.testing.assert_close(mine, 2 * theirs, atol=1e-12, rtol=1e-8)


def test_the_distance_to_a_teachers_streams_against_transformers_in_float64(hf_and_ours):
    """Its value and its gradient alone: the mean over blocks and tokens of the squared error, relative to the teacher's
    stream."""
    before, teacher = hf_and_ours(seed=1)
    hf, model = hf_and_ours(seed=2)
    idx, targets = torch.randint(0, 299, (2, 2, 30))
    after_blocks = []
    for block in (*before.transformer.h, *hf.transformer.h):
        block.register_forward_hook(lambda module, args, output: after_blocks.append(output))
    with torch.no_grad():
        before.double()(idx)
    hf.double()(idx)
    n = model.config.n_layer
    errors = [((ours - its) ** 2).sum(-1) / (its**2).sum(-1) for its, ours in zip(after_blocks[:n], after_blocks[n:])]
    far = torch.stack(errors).mean()
    far.backward()

    teacher = teacher.double().requires_grad_(False)
    losses = [objective_of(model.double(), teacher, kl_share=0.5, hidden_weight=w)(idx, targets) for w in (0.0, 3.0)]
    assert losses[1][1]["hidden"].item() == pytest.approx(far.item(), rel=1e-9)
    ((losses[1][0] - losses[0][0]) / 3).backward()
    for name in ("wte.weight", "h.0.mlp.c_fc.bias"):
        mine, theirs = (m.transformer.get_parameter(name).grad for m in (model, hf))
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-8)


def test_under_bfloat16_logits_far_from_zero_keep_their_loss_and_kl(hf_and_ours):
    """GPT-2's lie near -100. What all logits of a token have in common changes no distribution, but would be rounded
    in steps of 0.5."""
    models = [hf_and_ours(seed)[1] for seed in (1, 2)]
    for m in models:
        with torch.no_grad():
            m.transformer.ln_f.bias.fill_(1.0)
            m.lm_head.weight -= 100 / m.config.n_embd
    idx, targets = torch.randint(0, 299, (2, 2, 30))
    with torch.no_grad():
        with autocast_to(torch.bfloat16, "cpu"):
            found = objective_of(*models, kl_share=0.5)(idx, targets)[1]
        exact = objective_of(*(m.double() for m in models), kl_share=0.5)(idx, targets)[1]
    assert models[0](idx)[0].mean() < -80
    for term in ("loss", "kl"):
        assert found[term].item() == pytest.approx(exact[term].item(), abs=2e-3)


def test_targets_of_minus_1_do_not_count(hf_and_ours):
    _, model = hf_and_ours()
    idx = torch.randint(0, 300, (2, 64))
    targets = idx.roll(-1, 1)
    targets[:, 40:] = -1
    with torch.no_grad():
        logits = model(idx)[0]
        expected = nn.functional.cross_entropy(logits[:, :40].flatten(0, 1), targets[:, :40].flatten())
        assert model(idx, targets)[1].item() == pytest.approx(expected.item(), abs=1e-5)
        assert objective_of(model)(idx, targets)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient(hf_and_ours):
    _, model = hf_and_ours()
    idx = torch.randint(0, 300, (2, 65))
    grads = []
    for on in (False, True):
        model.zero_grad()
        model.train().gradient_checkpointing = on
        objective_of(model)(idx[:, :-1], idx[:, 1:])[0].backward()
        grads.append(model.transformer.wte.weight.grad.clone())
    assert torch.equal(*grads)


def test_the_auxiliary_loss_pulls_the_std_before_ln_f_to_its_mean_as_a_constant(hf_and_ours):
    """Value and gradient against the residual stream that transformers shows, in float64, with the mean over ordinary
    tokens as a number. Position 0 is far from it, and one token is end-of-text."""
    hf, model = hf_and_ours()
    hf, model = hf.double(), model.double()
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 10
        hf.transformer.wpe.weight[0] *= 10
    idx = torch.randint(0, 290, (2, 30))
    idx[1, 9] = 299
    before = []
    hf.transformer.ln_f.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    loss = hf(idx, labels=idx).loss * 0
    std = (before[0].var(-1, unbiased=False) + 1e-5).sqrt()
    ordinary = (idx != 299) & (torch.arange(30) > 0)
    spread = (std - std[ordinary].mean().item()).square().mean()
    (loss + spread).backward()

    plain = objective_of(model)(idx, idx)[0]
    total, terms = objective_of(model, aux_loss_weight=0.3)(idx, idx)
    assert terms["spread"].item() == pytest.approx(spread.item(), rel=1e-9)
    assert (total - plain).item() == pytest.approx(0.3 * spread.item(), rel=1e-9)
    model.zero_grad()
    (total - plain).backward()
    for name in ("wpe.weight", "h.0.mlp.c_fc.bias"):
        ours, theirs = (m.transformer.get_parameter(name).grad for m in (model, hf))
        torch.testing.assert_close(ours, 0.3 * theirs, atol=1e-9, rtol=1e-7)
