"""export.to_hooked, with TransformerLens 3, which does not run beside release 4: `make test-tl3`."""
import pytest
import torch
from conftest import random_hf, set_all_fake
from transformer_lens import HookedTransformer

import export
from model import GPT


@pytest.fixture
def removed(ln_free_run):
    return GPT.from_pretrained(ln_free_run + "/model").eval()


def small_shape(tmp_path):
    random_hf(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    model.measure_std(torch.randint(0, 50000, (2, 64)))
    return set_all_fake(model)


@pytest.mark.parametrize("which", ["removed", "small"])
def test_hooked_transformer_has_the_same_logits_and_no_normalization(which, request, tmp_path):
    model = request.getfixturevalue("removed") if which == "removed" else small_shape(tmp_path)
    hooked = export.to_hooked(model)
    assert isinstance(hooked, HookedTransformer) and hooked.cfg.normalization_type is None
    assert not any("LayerNorm" in type(m).__name__ or "RMSNorm" in type(m).__name__ for m in hooked.modules())
    idx = torch.randint(0, 256, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(hooked(idx), model(idx)[0], atol=1e-4, rtol=0)


def test_direct_logit_attribution_is_exact(removed):
    """The components' outputs times the unembedding, by TransformerLens's own decomposition: their sum is the logit."""
    hooked, idx = export.to_hooked(removed), torch.randint(0, 256, (1, 60))
    with torch.no_grad():
        logits, cache = hooked.run_with_cache(idx)
        parts, labels = cache.decompose_resid(return_labels=True)
        assert len(labels) == 2 + 2 * 4
        torch.testing.assert_close((parts @ hooked.W_U).sum(0) + hooked.b_U, logits, atol=1e-4, rtol=0)


def test_hooks_change_the_logits_as_our_own_do(removed):
    hooked, idx = export.to_hooked(removed), torch.randint(0, 256, (1, 30))
    with torch.no_grad():
        out = hooked.run_with_hooks(idx, fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)])
        removed.transformer.h[2].attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        torch.testing.assert_close(out, removed(idx)[0], atol=1e-4, rtol=0)
