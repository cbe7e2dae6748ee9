"""
parts/resemblance.py: how alike two models' circuits are, against scipy and numpy by hand.
"""
import numpy as np
import pytest
import torch
from conftest import TINY, without_layernorm
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from model import GPT
from parts.circuits import components, contributions, patterns, readers
from parts.resemblance import resemblance

WINDOWS = 3


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return dict(original=GPT.from_pretrained(TINY).eval(), free=without_layernorm(TINY).fold())


@pytest.fixture(scope="module")
def windows():
    return [tuple(torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(i))) for i in range(WINDOWS)]


@pytest.fixture(scope="module")
def found(models, windows):
    return resemblance(models, "original", windows)


def stream(model, x, layer):
    """The residual stream before a layer, or after the last, by hooks."""
    seen = []
    module = (*model.transformer.h, model.transformer.ln_f if not model.config.folded else model.lm_head)[layer]
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(x[None])
    hook.remove()
    return seen[0].double().numpy()


def test_the_streams_cosine_and_linear_cka(found, models, windows):
    for layer in (0, 2, 4):
        x, y = (np.concatenate([stream(model, ids, layer) for ids, _ in windows]) for model in models.values())
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        expected = cosine.reshape(WINDOWS, -1).mean(1)
        np.testing.assert_allclose(found["free"]["cosine"][:, layer], expected, atol=1e-4)
        x, y = x - x.mean(0), y - y.mean(0)
        gram_x, gram_y = x @ x.T, y @ y.T  # the form with kernels
        cka = (gram_x * gram_y).sum() / np.linalg.norm(gram_x) / np.linalg.norm(gram_y)
        assert found["free"]["cka"][layer] == pytest.approx(cka, abs=1e-4)


def test_the_patterns_jensen_shannon_divergence(found, models, windows):
    p, q = (patterns(model, windows[1][0]).numpy() for model in models.values())
    expected = np.mean(jensenshannon(p[2, 1], q[2, 1], axis=-1) ** 2)
    assert found["free"]["attention_js"][1, 2, 1] == pytest.approx(expected, abs=1e-5)


def test_rank_correlations_of_contributions_and_of_effects(found, models, windows):
    x, y = windows[0]
    written = {name: components(model, x) for name, model in models.items()}
    direct, effects = {}, {}
    for name, model in models.items():
        logits = readers(model)["logits"]
        everything = contributions(written[name], logits)  # (components, T, vocab)
        direct[name] = everything[:, torch.arange(len(y)), y].numpy()
        whole, rows = written[name].writes.sum(0), []
        for write in written[name].writes:
            with torch.no_grad():
                ablated = [model.lm_head(model.final_norm(s[None], torch.tensor(False)))[0]
                           for s in (whole, whole - write)]
            rows.append((ablated[0] - ablated[1])[torch.arange(len(y)), y].numpy())
        effects[name] = np.array(rows)
    for key, values in (("contributions", direct), ("effects", effects)):
        rho = np.mean([spearmanr(values["original"][:, t], values["free"][:, t])[0] for t in range(len(y))])
        assert found["free"][key][0] == pytest.approx(rho, abs=2e-3)
    np.testing.assert_allclose(effects["free"], direct["free"], atol=1e-3)  # without LayerNorm they are the same
    assert np.abs(effects["original"] - direct["original"]).max() > 0.5


def test_a_model_resembles_itself(models, windows):
    found = resemblance(dict(original=models["original"], same=GPT.from_pretrained(TINY).eval()), "original", windows)
    same = found["same"]
    for key in ("cosine", "cka", "contributions", "effects"):
        assert same[key] == pytest.approx(np.ones_like(same[key]), abs=1e-5)
    assert same["attention_js"].max() < 1e-6
