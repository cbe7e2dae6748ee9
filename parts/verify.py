"""
Is a model really LN-free? Then whatever reads the residual stream is affine in it:
f(a x + (1 - a) y) = a f(x) + (1 - a) f(y).
"""
import torch

MIX = 0.3  # a


@torch.inference_mode()
def problems(model):
    """The reasons why a model, folded or not, is not LN-free; empty if it is. Converts the model to float64."""
    model = model.double()
    reasons = model.why_not_ln_free()
    if not reasons and not model.config.folded:
        unfolded, model = model, model.fold()
        reasons += why_other_logits(unfolded, model)
    if model.config.folded:
        norms = [(name, type(module).__name__) for name, module in model.named_modules()]
        reasons += [f"{name} is a {kind}" for name, kind in norms if "norm" in kind.lower()]
    return reasons + why_not_affine(model)


def why_other_logits(model, folded):
    torch.manual_seed(0)
    shape = 2, min(64, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, shape, device=model.lm_head.weight.device)
    logits = model(idx)[0]
    apart = ((logits - folded(idx)[0]).abs().max() / logits.abs().max()).item()
    return [] if apart < 1e-10 else [f"folded and unfolded logits differ by {apart:.1e} of the largest"]


def why_not_affine(model):
    """Give every reader of the residual stream a random stream x, another y of a different scale, and their mixture.
    Readers are c_attn, c_fc and lm_head of a folded model, and the sites of any other."""
    readers = model.sites()
    if not readers:
        readers = {name: m for name, m in model.named_modules() if name.endswith(("c_attn", "c_fc", "lm_head"))}
    outputs, hooks = {name: [] for name in readers}, []
    for name, reader in readers.items():
        hooks.append(reader.register_forward_hook(lambda module, args, out, name=name: outputs[name].append(out)))
    for block in model.transformer.h:  # nothing is written: all readers see the stream that replaces the embedding
        for sublayer in (block.attn, block.mlp):
            hooks.append(sublayer.register_forward_hook(lambda module, args, out: torch.zeros_like(out)))

    weight = model.lm_head.weight
    T = min(64, model.config.block_size)
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, T, model.config.n_embd, dtype=weight.dtype, device=weight.device)
    y = 3 * y + 1
    for stream in (x, y, MIX * x + (1 - MIX) * y):
        hook = model.transformer.drop.register_forward_hook(lambda module, args, out: stream)
        model(torch.zeros(1, T, dtype=torch.long, device=weight.device))
        hook.remove()
    for hook in hooks:
        hook.remove()

    reasons = []
    for name, (of_x, of_y, of_mixture) in outputs.items():
        off = ((of_mixture - MIX * of_x - (1 - MIX) * of_y).abs().max() / of_mixture.abs().max()).item()
        if not off < 1e-10:
            reasons.append(f"{name} is not affine: off by {off:.1e} of its largest value")
    return reasons
