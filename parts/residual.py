"""
The residual stream that the sublayers read: its std before each site, and the attention sink at position 0.
"""
import numpy as np
import torch

from model import std_of
from parts.circuits import pattern

SINK = 0.3  # a query with a larger weight on position 0 attends to the sink: the default of arXiv 2507.02559's code


@torch.inference_mode()
def residual_stats(model, batches):
    """batches of ids (B, T) -> {"sites": {site: {kind of token: {"mean", "spread", "tokens"} of the std before the
    site, or None}}, "sink_rate", "sink_heads"}.

    Kinds of tokens are position_0, eot (end-of-text after position 0) and others. ln_1qk and ln_1v read the same
    stream, ln_1. The sink rate is the share of heads and queries, without query 0, that attend to the sink; with
    query 0, as in arXiv 2507.02559's code, it would be rate * (T - 1) / T + 1 / T. "sink_heads" is what its text says:
    the share of heads whose mean attention to position 0 exceeds SINK, over the same queries."""
    stds, ids, sinks = {}, [], [[] for _ in model.transformer.h]

    def note_std(site, x):
        stds.setdefault(site, []).append(std_of(x, model.config.ln_eps).squeeze(-1).cpu().numpy())  # (B, T)

    hooks = []
    for i, block in enumerate(model.transformer.h):
        ln_1, ln_2 = (block.attn, block.mlp) if block.folded else (block.ln_1qk, block.ln_2)
        for site, reader in ((f"h.{i}.ln_1", ln_1), (f"h.{i}.ln_2", ln_2)):
            hooks.append(reader.register_forward_pre_hook(lambda module, args, site=site: note_std(site, args[0])))
        hooks.append(block.attn.register_forward_pre_hook(
            lambda attn, args, i=i: sinks[i].extend(attention_to_0(attn, args[0]))))
    for x in batches:
        note_std("ln_f", model.run_blocks(x)[0])
        ids.append(x.cpu().numpy())
    for hook in hooks:
        hook.remove()

    ids = np.concatenate(ids)  # (windows, T)
    first = np.broadcast_to(np.arange(ids.shape[1]) == 0, ids.shape)
    eot = ids == model.config.eot
    kinds = dict(position_0=first, eot=eot & ~first, others=~eot & ~first)
    sites = {}
    for site, parts in stds.items():
        of_kinds = {kind: np.concatenate(parts)[which] for kind, which in kinds.items()}
        sites[site] = {kind: dict(mean=std.mean(), spread=std.std(), tokens=std.size) if std.size else None
                       for kind, std in of_kinds.items()}
    weights = np.array(sinks)  # (L, windows, heads, 2)
    above, mean = weights[..., 0].mean(), weights[..., 1].mean(1)
    return dict(sites=sites, sink_rate=float(above), sink_heads=float((mean > SINK).mean()))


def attention_to_0(attn, x):
    """Attention's input (B, T, C) -> for each window (heads, 2): the share of queries that attend to the sink, and
    their mean attention to position 0."""
    found = []
    for window in x:  # one at a time: (heads, T, T) is large
        to_0 = pattern(attn, window)[:, 1:, 0]  # (heads, T - 1)
        found.append(torch.stack([(to_0 > SINK).float().mean(1), to_0.mean(1)], 1).cpu().numpy())
    return found
