"""
The residual stream: its std before each site, and how much attention goes to position 0, the attention sink.
"""
import math

import numpy as np
import torch

from model import std_of

SINK = 0.3  # a query with more than this weight on position 0 counts; our own bound


@torch.inference_mode()
def residual_stats(model, batches):
    """batches of ids (B, T) -> {"sites": {site: {kind: {"mean", "spread", "tokens"} of the std before the site, or
    None}}, "sink_rate"}. The kinds of tokens are position_0, eot (end-of-text elsewhere) and others. ln_1qk and ln_1v
    read the same stream, ln_1. The sink rate is the fraction of heads and queries, without the first query, that put
    more than SINK of their attention on position 0."""
    stds, ids, sinks = {}, [], []

    def note_std(site):
        def note(module, args):
            std = std_of(args[0], model.config.ln_eps).squeeze(-1)  # (B, T)
            stds.setdefault(site, []).append(std.cpu().numpy())
        return note

    hooks = []
    for i, block in enumerate(model.transformer.h):
        hooks.append(block.register_forward_pre_hook(note_std(f"h.{i}.ln_1")))
        hooks.append(block.attn.register_forward_pre_hook(lambda attn, args: sinks.extend(sink_rates(attn, args[0]))))
        reads_ln_2 = block.mlp if block.folded else block.ln_2
        hooks.append(reads_ln_2.register_forward_pre_hook(note_std(f"h.{i}.ln_2")))
    try:
        for x in batches:
            note_std("ln_f")(model, model.run_blocks(x))
            ids.append(x.cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()

    ids = np.concatenate(ids)  # (windows, T)
    first = np.broadcast_to(np.arange(ids.shape[1]) == 0, ids.shape)
    eot = ids == model.config.eot
    kinds = dict(position_0=first, eot=eot & ~first, others=~eot & ~first)
    sites = {}
    for site, batches_of_std in stds.items():
        std = np.concatenate(batches_of_std)  # (windows, T)
        sites[site] = {kind: mean_and_spread(std[which]) for kind, which in kinds.items()}
    return dict(sites=sites, sink_rate=float(np.mean(sinks)))


def sink_rates(attn, x):
    """The input of an attention's queries and keys (B, T, C) -> the sink rate of each window, a list."""
    T = x.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
    q, k, _ = attn.c_attn(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (attn.n_head, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, T, C / heads)
    rates = []
    for q1, k1 in zip(q, k):  # one window at a time, because (heads, T, T) is large
        scores = (q1 @ k1.mT / math.sqrt(q1.shape[-1])).float()
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        rates.append((weights[:, 1:, 0] > SINK).float().mean().item())
    return rates


def mean_and_spread(std):
    return dict(mean=std.mean(), spread=std.std(), tokens=std.size) if std.size else None
