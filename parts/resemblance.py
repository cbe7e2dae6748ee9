"""
Do the circuits of one model resemble those of another? Their residual streams, attention patterns, and what each
component contributes to the right token's logit, on the same windows.
"""

import numpy as np
import torch

from parts.circuits import components, copying, patterns, prefix_matching, readers


@torch.no_grad()
def resemblance(models, reference, windows):
    """models: {name: GPT}; reference: one of the names; windows: (inputs, targets), (T,) each. -> {name: {
    "cosine": (windows, L + 1), of the residual stream before each layer and after the last, mean over tokens;
    "cka": (L + 1,), linear, over all tokens (Kornblith et al., arXiv 1905.00414);
    "attention_js": (windows, L, heads), Jensen-Shannon divergence of the patterns in nats, mean over queries;
    "contributions", "effects": (windows,), Spearman's correlation over components of what each adds to the right
    token's logit, and of how much the logit falls without it, mean over tokens;
    "prefix_matching", "copying": (L, heads), of tools/circuits.py}}; without the comparisons for the reference."""
    keys = ("cosine", "attention_js", "contributions", "effects")
    found = {name: {key: [] for key in keys} for name in models if name != reference}
    cka = {name: LinearCKA() for name in found}
    reads = {name: readers(model) for name, model in models.items()}
    for x, y in windows:
        theirs = observe(models[reference], reads[reference], x, y)
        for name in found:
            ours = observe(models[name], reads[name], x, y)
            cosine = torch.cosine_similarity(ours["streams"], theirs["streams"], -1).mean(-1)
            found[name]["cosine"].append(cosine.cpu().numpy())
            cka[name].add(ours["streams"], theirs["streams"])
            js = jensen_shannon(ours["patterns"], theirs["patterns"]).mean(-1)
            found[name]["attention_js"].append(js.cpu().numpy())
            for key in ("contributions", "effects"):
                found[name][key].append(spearman(ours[key], theirs[key]).mean().item())
    result = {name: dict(prefix_matching=prefix_matching(model).cpu().numpy(), copying=copying(model).numpy())
              for name, model in models.items()}
    for name, values in found.items():
        result[name] |= {key: np.array(rows) for key, rows in values.items()} | dict(cka=cka[name].value())
    return result


def observe(model, reads, x, y):
    """What a model does on x (T,) with targets y (T,): its "streams" (L + 1, T, C), "patterns" (L, heads, T, T), and
    each component's "contributions" to and "effects" on the target's logit, (components, T)."""
    written = components(model, x)
    names = [f"h.{layer} queries" for layer in range(model.config.n_layer)] + ["logits"]
    streams = torch.stack([written.stream(reads[name]) for name in names])
    logits = reads["logits"]
    rows = logits.weight[y]  # (T, C)
    direct = torch.einsum("ntc,tc->nt", written.writes, rows)
    scale = logits.scale(streams[-1]).squeeze(-1)  # (T,)
    total = direct.sum(0)
    without = torch.stack([logits.scale(streams[-1] - write).squeeze(-1) for write in written.writes])
    effects = total / scale - (total - direct) / without
    return dict(streams=streams, patterns=patterns(model, x), contributions=direct / scale, effects=effects)


def jensen_shannon(p, q):
    """Distributions (..., n) -> (...,), in nats."""
    m = (p + q) / 2

    def kl(a):
        return torch.xlogy(a, a / m.clamp(min=1e-30)).sum(-1)

    return ((kl(p) + kl(q)) / 2).clamp(min=0)


def spearman(a, b):
    """(n, ...), (n, ...) -> (...): the rank correlation over n."""
    a, b = (t.argsort(0).argsort(0).double() - (len(t) - 1) / 2 for t in (a, b))
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


class LinearCKA:
    """Centred kernel alignment of two models' streams, layer by layer, summed up window by window."""

    def __init__(self):
        self.n, self.sums, self.products = 0, 0, 0

    def add(self, x, y):
        """x, y (layers, T, C)."""
        both = torch.cat([x, y], -1).double()
        self.n += x.shape[1]
        self.sums = self.sums + both.sum(1)
        self.products = self.products + both.mT @ both

    def value(self):
        """(layers,)"""
        mean = self.sums / self.n
        covariance = self.products / self.n - mean[:, :, None] * mean[:, None]
        C = covariance.shape[-1] // 2
        xx, xy, yy = covariance[:, :C, :C], covariance[:, :C, C:], covariance[:, C:, C:]
        norms = [part.square().sum((1, 2)) for part in (xx, xy, yy)]
        return (norms[1] / (norms[0] * norms[2]).sqrt()).cpu().numpy()
