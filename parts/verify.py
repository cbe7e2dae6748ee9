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
        torch.manual_seed(0)
        shape = 2, min(64, model.config.block_size)
        idx = torch.randint(model.config.vocab_size, shape, device=model.lm_head.weight.device)
        logits = unfolded(idx)[0]
        apart = ((logits - model(idx)[0]).abs().max() / logits.abs().max()).item()
        reasons += [f"folded and unfolded logits differ by {apart:.1e} of the largest"] * (not apart < 1e-10)
    if model.config.folded:
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        reasons += [f"{name} is a {kind}" for name, kind in kinds.items() if "norm" in kind.lower()]
    return reasons + why_not_affine(model)


def why_not_affine(model):
    """Give every reader of the residual stream a random stream x, another y of a different scale, and their mixture.
    Readers are c_attn, c_fc and lm_head of a folded model, and the sites of any other."""
    readers = model.sites()
    if not readers:
        readers = {name: m for name, m in model.named_modules() if name.endswith(("c_attn", "c_fc", "lm_head"))}
    weight, T = model.lm_head.weight, min(64, model.config.block_size)
    torch.manual_seed(0)
    x, y = torch.randn(2, T, model.config.n_embd, dtype=weight.dtype, device=weight.device)
    y = 3 * y + 1
    streams = torch.stack([x, y, MIX * x + (1 - MIX) * y])
    outputs, hooks = {}, [model.transformer.drop.register_forward_hook(lambda module, args, out: streams)]
    for name, reader in readers.items():
        hooks.append(reader.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out})))
    for block in model.transformer.h:  # nothing is written: all readers see the streams that replace the embedding
        for sublayer in (block.attn, block.mlp):
            hooks.append(sublayer.register_forward_hook(lambda module, args, out: torch.zeros_like(out)))
    model(torch.zeros(3, T, dtype=torch.long, device=weight.device))
    for hook in hooks:
        hook.remove()

    reasons = []
    for name, (of_x, of_y, of_mixture) in outputs.items():
        off = ((of_mixture - MIX * of_x - (1 - MIX) * of_y).abs().max() / of_mixture.abs().max()).item()
        if not off < 1e-10:
            reasons.append(f"{name} is not affine: off by {off:.1e} of its largest value")
    return reasons
