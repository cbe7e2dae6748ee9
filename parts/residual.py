"""
The residual stream that the sublayers read: its std before each site, and how much of their
attention rests on position 0.
"""
import math

import numpy as np
import torch

from model import std_of

SINK = 0.3  # of a query's attention on position 0, from which it counts as resting there: our own bound


@torch.inference_mode()
def residual_stats(model, batches):
    """batches of ids (B, T) -> {"sites": {site: {kind of token: {"mean", "spread", "tokens"} of the
    std before the site, or None}}, "sink_rate"}. The kinds are position_0, eot (other end-of-text
    tokens) and others. ln_1qk and ln_1v read the same stream, ln_1. The sink rate is the share of
    heads and queries, the first query apart, that put more than SINK of their weight on position 0."""
    stds, ids, sinks = {}, [], []

    def note_std(site, x):
        std = std_of(x, model.config.ln_eps).squeeze(-1)  # (B, T)
        stds.setdefault(site, []).append(std.cpu().numpy())

    hooks = []
    for i, block in enumerate(model.transformer.h):
        reads_ln_1, reads_ln_2 = (block.attn, block.mlp) if block.folded else (block.ln_1qk, block.ln_2)
        hooks += [
            reads_ln_1.register_forward_pre_hook(lambda module, args, site=f"h.{i}.ln_1": note_std(site, args[0])),
            reads_ln_2.register_forward_pre_hook(lambda module, args, site=f"h.{i}.ln_2": note_std(site, args[0])),
            block.attn.register_forward_pre_hook(lambda attn, args: sinks.extend(sink_rates(attn, args[0]))),
        ]
    try:
        for x in batches:
            note_std("ln_f", model.run_blocks(x)[0])
            ids.append(x.cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()

    ids = np.concatenate(ids)  # (windows, T)
    first = np.broadcast_to(np.arange(ids.shape[1]) == 0, ids.shape)
    eot = ids == model.config.eot
    kinds = dict(position_0=first, eot=eot & ~first, others=~eot & ~first)
    sites = {}
    for site, parts in stds.items():
        std = np.concatenate(parts)  # (windows, T)
        sites[site] = {kind: mean_and_spread(std[which]) for kind, which in kinds.items()}
    return dict(sites=sites, sink_rate=float(np.mean(sinks)))


def sink_rates(attn, x):
    """An attention's input (B, T, C) -> of each window, the share of heads and queries that rest on
    position 0."""
    T = x.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    q, k, _ = attn.c_attn(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, T, C / heads)
    rates = []
    for q1, k1 in zip(q, k):  # a window at a time: (heads, T, T) is large
        scores = (q1 @ k1.mT / math.sqrt(q1.shape[-1])).float()
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        rates.append((weights[:, 1:, 0] > SINK).float().mean().item())
    return rates


def mean_and_spread(std):
    if std.size == 0:
        return None
    return dict(mean=std.mean(), spread=std.std(), tokens=std.size)
