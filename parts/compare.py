"""
Several models on the same windows: each token's loss, and how far a model's next-token distribution
is from a reference's.
"""
import math
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from model import EVAL_ROWS, pieces
from parts.data import read_windows
from parts.ranks import RANK


BY_TOKEN = ("loss", "confidence", "hit")  # what is kept for each token, and not as a window's mean


def divergences(log_q, log_p):
    """Log-probabilities (rows, vocab) of a reference q and a model p -> of each row KL(q || p) and
    the Jensen-Shannon divergence, in nats, and whether both find the same token likeliest, (rows,)
    each."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # of the mixture (p + q) / 2
    kl = (q * (log_q - log_p)).sum(-1)
    js = ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1)) / 2
    return kl, js, log_p.argmax(-1) == log_q.argmax(-1)


def compare(models, reference, hidden, targets):
    """{name: {"loss"; "confidence", the likeliest token's probability; "hit", whether that is the target;
    "entropy", in nats; and where it is not the reference "kl", "js", "agree"}}, a value for each token,
    (N,) each.

    models: {name: GPT}, of which reference is a name; hidden: {name: what its unembedding reads, (N, C)};
    targets (N,)."""
    found = {name: defaultdict(list) for name in models}
    rows = zip(*(pieces(hidden[name], EVAL_ROWS) for name in models), pieces(targets, EVAL_ROWS))
    for *xs, y in rows:
        log_p = {}  # (rows, vocab) each
        for (name, model), x in zip(models.items(), xs):
            log_p[name] = model.exact_logits(x).log_softmax(-1)
        for name in models:
            found[name]["loss"].append(-log_p[name].gather(1, y.unsqueeze(1))[:, 0])
            best, likeliest = log_p[name].max(-1)
            found[name]["confidence"].append(best.exp())
            found[name]["hit"].append((likeliest == y).float())
            found[name]["entropy"].append(-(log_p[name].exp() * log_p[name]).sum(-1))
            if name != reference:
                kl, js, agree = divergences(log_p[reference], log_p[name])
                found[name]["kl"].append(kl)
                found[name]["js"].append(js)
                found[name]["agree"].append(agree.float())
    for values in found.values():
        for key in values:
            values[key] = torch.cat(values[key])
    return found


@torch.inference_mode()
def measure(models, reference, tokens, starts, block_size, batch_size, device, autocast):
    """{name: {"loss", "confidence" and "hit": (windows, block_size), "entropy" and against the reference
    "kl", "js", "agree": (windows,)}} of the windows of tokens that begin at starts (windows,).
    reference: a name of models, or None for the losses alone."""
    result = {}
    for name in models:
        keys = ["loss"]
        if reference is not None:
            keys += ["confidence", "hit", "entropy"]
            keys += ["kl", "js", "agree"] * (name != reference)
        result[name] = {}
        for key in keys:
            shape = (len(starts), block_size) if key in BY_TOKEN else len(starts)
            result[name][key] = np.zeros(shape, np.float32 if key in BY_TOKEN else np.float64)
    firsts = range(0, len(starts), batch_size)
    for i in tqdm(firsts, "windows", unit="batch", leave=False, disable=None if RANK == 0 else True):
        x, y = read_windows(tokens, starts[i : i + batch_size], block_size, device)
        targets = y.flatten()
        with autocast:
            hidden = {name: model.hidden(x).flatten(0, 1) for name, model in models.items()}  # (B T, C)
            if reference is None:
                values = {name: dict(loss=m.token_losses(hidden[name], targets)) for name, m in models.items()}
            else:
                values = compare(models, reference, hidden, targets)
        for name in models:
            for key, value in values[name].items():
                value = value.view(y.shape).cpu()
                result[name][key][i : i + batch_size] = value if key in BY_TOKEN else value.double().mean(-1)
    return result


def calibration_error(confidence, hit, bins=15):
    """Expected calibration error (Guo et al., arXiv 1706.04599): tokens (N,) in bins of equal width by their
    confidence; the mean difference between a bin's confidence and its share of hits, by its tokens. NaN
    where a confidence is."""
    if not np.isfinite(confidence).all():
        return math.nan
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    apart = np.bincount(which, confidence - hit, bins)  # sums over a bin
    return np.abs(apart).sum() / len(confidence)


def mean_and_error(windows):
    """Mean over the windows' means (windows,), and its standard error."""
    windows = windows.astype(np.float64)
    if len(windows) < 2:
        return windows.mean(), float("nan")
    return windows.mean(), windows.std(ddof=1) / np.sqrt(len(windows))


def cast_linear_maps(model):
    """Change a model in place: do what autocast to bfloat16 would do to the weights of the linear maps at each call, once; but for
    the unembedding, which stays in float32."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m is not model.lm_head:
            m.weight = torch.nn.Parameter(m.weight.bfloat16())
            if m.bias is not None:
                m.bias = torch.nn.Parameter(m.bias.bfloat16())
