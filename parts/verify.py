"""
Is a model really LN-free? Then everything that reads the residual stream reads it affinely:
f(a x + (1 - a) y) = a f(x) + (1 - a) f(y).
"""
import math

import torch

MIX = 0.3  # a
TOLERANCE = 1e-10  # of the largest value, in float64


@torch.inference_mode()
def problems(model):
    """The reasons why the model, folded or not, is not LN-free; empty if it is. Converts the model to float64."""
    model = model.double()
    reasons = model.why_not_ln_free()
    for name, site in model.sites().items():
        if not 0 < site.avg_std < math.inf:
            reasons.append(f"{name}: its constant is {site.avg_std.item()}")
    if not reasons and not model.config.folded:
        folded = model.fold()
        torch.manual_seed(0)
        shape = 2, min(64, model.config.block_size)
        idx = torch.randint(model.config.vocab_size, shape, device=model.lm_head.weight.device)
        off = relative(model(idx)[0] - folded(idx)[0], model(idx)[0])
        if not off < TOLERANCE:
            reasons.append(f"folded and unfolded logits differ by {off:.1e} of the largest")
        model = folded
    for name, module in model.named_modules():
        if model.config.folded and "norm" in type(module).__name__.lower():
            reasons.append(f"{name} is a {type(module).__name__}")
    return reasons + why_not_affine(model)


def relative(difference, values):
    return (difference.abs().max() / values.abs().max()).item()


def why_not_affine(model):
    """The readers of the residual stream that are not affine: the sites, or c_attn, c_fc and lm_head of a folded
    model. They read random streams of different scales."""
    readers = model.sites()
    if not readers:
        readers = {name: m for name, m in model.named_modules() if name.endswith(("c_attn", "c_fc", "lm_head"))}
    outputs = {name: [] for name in readers}
    hooks = []
    for name, reader in readers.items():
        hooks.append(reader.register_forward_hook(lambda module, args, out, name=name: outputs[name].append(out)))
    for block in model.transformer.h:  # no sublayer writes, so all readers see the stream that replaces the embedding
        for sublayer in (block.attn, block.mlp):
            hooks.append(sublayer.register_forward_hook(lambda module, args, out: torch.zeros_like(out)))

    T = min(64, model.config.block_size)
    weight = model.lm_head.weight
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, T, model.config.n_embd, dtype=weight.dtype, device=weight.device)
    y = 3 * y + 1
    for stream in (x, y, MIX * x + (1 - MIX) * y):
        embedding = model.transformer.drop.register_forward_hook(lambda module, args, out: stream)
        model(torch.zeros(1, T, dtype=torch.long, device=weight.device))
        embedding.remove()
    for hook in hooks:
        hook.remove()

    reasons = []
    for name, (of_x, of_y, of_mixture) in outputs.items():
        off = relative(of_mixture - MIX * of_x - (1 - MIX) * of_y, of_mixture)
        if not off < TOLERANCE:
            reasons.append(f"{name} is not affine: off by {off:.1e} of its largest value")
    return reasons
