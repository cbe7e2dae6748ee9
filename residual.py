"""
What the sublayers read from the residual stream: its std before each site, and whether they read it affinely, as without LayerNorm.
What eval.py runs for --dataset=residual and --verify.
"""
import math

import numpy as np
import torch


@torch.inference_mode()
def stats(model, batches):
    """batches of ids (B, T) -> {"sites": {site: {kind of token: {"mean", "spread", "tokens"} of the std before the site, or None}},
    "sink_rate"}. The kinds are position_0, eot (end-of-text tokens behind it) and others; ln_1qk and ln_1v read the same, ln_1. The sink
    rate is the share of heads and queries behind position 0 that put more than 0.3 of their weight on position 0."""
    stds, ids, sinks = {}, [], []

    def note(site):
        def hook(module, args):
            std = torch.sqrt(args[0].float().var(-1, unbiased=False) + model.config.ln_eps)  # (B, T)
            stds.setdefault(site, []).append(std.cpu().numpy())

        return hook

    def note_sinks(attn, args):
        T = args[0].shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=args[0].device).tril()
        q, k = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in attn.c_attn(args[0]).chunk(3, -1)[:2])
        for q1, k1 in zip(q, k):  # a window at a time: (heads, T, T) is large
            weights = (q1 @ k1.mT / math.sqrt(q1.shape[-1])).float().masked_fill(~causal, -math.inf).softmax(-1)
            sinks.append((weights[:, 1:, 0] > 0.3).float().mean().item())

    hooks = []
    for i, block in enumerate(model.transformer.h):
        before = (block.attn, block.mlp) if block.folded else (block.ln_1qk, block.ln_2)
        hooks += [m.register_forward_pre_hook(note(f"h.{i}.{name}")) for m, name in zip(before, ("ln_1", "ln_2"))]
        hooks.append(block.attn.register_forward_pre_hook(note_sinks))
    try:
        for x in batches:
            note("ln_f")(None, model.residual(x))
            ids.append(x.cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    ids = np.concatenate(ids)
    first, eot = np.broadcast_to(np.arange(ids.shape[1]) == 0, ids.shape), ids == model.config.eot
    kinds = dict(position_0=first, eot=eot & ~first, others=~eot & ~first)

    def of(std):
        return dict(mean=std.mean(), spread=std.std(), tokens=std.size) if std.size else None

    stds = {site: np.concatenate(parts) for site, parts in stds.items()}
    sites = {site: {kind: of(std[which]) for kind, which in kinds.items()} for site, std in stds.items()}
    return dict(sites=sites, sink_rate=float(np.mean(sinks)))


@torch.inference_mode()
def why_not_ln_free(model):
    """The reasons why the model, folded or not, is not LN-free; empty if it is. In float64, to which the model is converted.

    The direct test: whatever reads the residual stream (c_attn, c_fc and lm_head of a folded model; the sites of one that can't be
    folded) must be an affine map of it, f(a x + (1 - a) y) = a f(x) + (1 - a) f(y), for random x and y of different scales."""
    model = model.double()
    reasons = [f"{site} is still real" for site, mode in model.ln_modes().items() if mode == "real"]
    reasons += [f"the {kind} treatment is still on" for kind, on in (("bos", model.bos_on), ("eot", model.eot_on)) if on]
    reasons += [f"{name}: its constant is {site.avg_std.item()}" for name, site in model.sites().items() if not 0 < site.avg_std < math.inf]
    T, device = min(64, model.config.block_size), model.lm_head.weight.device
    torch.manual_seed(0)
    if not reasons and not model.config.folded:
        idx = torch.randint(model.config.vocab_size, (2, T), device=device)
        logits, model = model(idx)[0], model.fold()
        apart = ((logits - model(idx)[0]).abs().max() / logits.abs().max()).item()
        reasons += [f"folded and unfolded logits differ by {apart:.1e} of the largest"] if not apart < 1e-10 else []
    if model.config.folded:
        reasons += [f"{name} is a {type(m).__name__}" for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]

    read = {}
    readers = model.sites() or {name: m for name, m in model.named_modules() if name.endswith(("c_attn", "c_fc", "lm_head"))}
    hooks = [m.register_forward_hook(lambda module, args, out, name=name: read.setdefault(name, []).append(out)) for name, m in readers.items()]
    for block in model.transformer.h:  # no sublayer writes, so that all read the stream that stands in for the embedding
        hooks += [m.register_forward_hook(lambda module, args, out: torch.zeros_like(out)) for m in (block.attn, block.mlp)]
    x, y = torch.randn(2, 1, T, model.config.n_embd, dtype=torch.float64, device=device)
    y = 3 * y + 1
    for stream in (x, y, 0.3 * x + 0.7 * y):
        hook = model.transformer.drop.register_forward_hook(lambda module, args, out: stream)
        model(torch.zeros(1, T, dtype=torch.long, device=device))
        hook.remove()
    for hook in hooks:
        hook.remove()
    for name, (fx, fy, mixed) in read.items():
        off = ((mixed - 0.3 * fx - 0.7 * fy).abs().max() / mixed.abs().max()).item()
        reasons += [f"{name} is not affine: off by {off:.1e} of its largest value"] if not off < 1e-10 else []
    return reasons
