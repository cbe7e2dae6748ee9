"""
to_hooked: a HookedTransformer of TransformerLens 3 has the same logits as our model, and no normalization. Release 3
does not run beside release 4: `make test-tl3`.
"""
import torch
from conftest import SMALL, random_hf, without_layernorm

from tools import circuits, export


@torch.no_grad()
def assert_hooked_has_the_logits_of(model, idx):
    hooked = export.to_hooked(model)
    assert hooked.cfg.normalization_type is None
    assert not any("Norm" in type(module).__name__ for module in hooked.modules())
    torch.testing.assert_close(hooked(idx), model(idx)[0], atol=1e-4, rtol=0)
    return hooked


def test_logits_of_gpt2_smalls_shape(tmp_path):
    random_hf(**SMALL).save_pretrained(tmp_path)
    assert_hooked_has_the_logits_of(without_layernorm(tmp_path), torch.randint(0, 256, (2, 60)))


@torch.no_grad()
def test_direct_logit_attribution_is_exact_and_hooks_change_the_logits_as_our_own_do(removed):
    """TransformerLens's own decomposition: the components' outputs times the unembedding sum up to the logit."""
    idx = torch.randint(0, 256, (1, 60))
    hooked = assert_hooked_has_the_logits_of(removed, idx)
    logits, cache = hooked.run_with_cache(idx)
    attributed = (cache.decompose_resid() @ hooked.W_U).sum(0) + hooked.b_U
    torch.testing.assert_close(attributed, logits, atol=1e-4, rtol=0)

    out = hooked.run_with_hooks(idx, fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)])
    removed.transformer.h[2].attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    torch.testing.assert_close(out, removed(idx)[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_circuits_are_transformer_lens_own(removed):
    hooked, free = export.to_hooked(removed), removed.fold()
    for kind, scores in circuits.composition(free).items():
        torch.testing.assert_close(scores, hooked.all_composition_scores(kind), atol=1e-4, rtol=0)

    ids = torch.randint(0, 256, (30,))
    _, cache = hooked.run_with_cache(ids[None])
    written = circuits.components(free, ids)
    heads, labels = cache.stack_head_results(return_labels=True)
    for head, label in zip(heads, labels):  # "L2H1"
        layer, _, number = label[1:].partition("H")
        ours = written.writes[written.names.index(f"h.{layer} head {number}")]
        torch.testing.assert_close(head[0], ours, atol=1e-4, rtol=0)
    scores = cache["blocks.2.attn.hook_attn_scores"][0, 1]  # -inf above the diagonal
    ours = circuits.attention_scores(free, ids, 2, 1).total()
    torch.testing.assert_close(scores.tril(), ours.tril(), atol=1e-4, rtol=0)
