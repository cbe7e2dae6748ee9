"""
Several models on the same windows: each token's loss, and how far each model's next-token distribution is from that
of a reference.
"""
import math
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from parts import ranks
from parts.data import read_windows
from parts.loss import EVAL_ROWS, exact_logits, pieces, token_losses

BY_TOKEN = ("loss", "confidence", "hit")  # kept for each token
BY_WINDOW = ("entropy", "kl", "js", "agree")  # kept as a window's mean


def divergences(log_q, log_p):
    """Log-probabilities (rows, vocab) of a reference q and a model p -> KL(q || p) and the Jensen-Shannon divergence,
    in nats, and whether both have the same likeliest token, (rows,) each."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # of the mixture (p + q) / 2
    kl = (q * (log_q - log_p)).sum(-1)
    js = ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1)) / 2
    return kl, js, log_p.argmax(-1) == log_q.argmax(-1)


def compare(models, reference, hidden, targets):
    """models {name: GPT}, reference one of the names, hidden {name: what the unembedding reads (N, C)}, targets (N,)
    -> {name: {quantity: its value for each token (N,)}}: the loss; confidence, the likeliest token's probability; hit,
    whether that token is the target; the entropy in nats; and, except for the reference, kl, js and agree."""
    found = {name: defaultdict(list) for name in models}
    for *xs, y in zip(*(pieces(hidden[name], EVAL_ROWS) for name in models), pieces(targets, EVAL_ROWS)):
        log_p = {}  # (rows, vocab) each
        for (name, model), x in zip(models.items(), xs):
            log_p[name] = exact_logits(model, x).log_softmax(-1)
        for name, values in found.items():
            values["loss"].append(-log_p[name].gather(1, y.unsqueeze(1))[:, 0])
            best, likeliest = log_p[name].max(-1)
            values["confidence"].append(best.exp())
            values["hit"].append((likeliest == y).float())
            values["entropy"].append(-(log_p[name].exp() * log_p[name]).sum(-1))
            if name != reference:
                kl, js, agree = divergences(log_p[reference], log_p[name])
                values["kl"].append(kl)
                values["js"].append(js)
                values["agree"].append(agree.float())
    return {name: {key: torch.cat(values) for key, values in found[name].items()} for name in models}


@torch.inference_mode()
def measure(models, reference, tokens, starts, block_size, batch_size, device, autocast):
    """models {name: GPT}, and windows of tokens that begin at starts (windows,) -> {name: {quantity: array}}, the
    quantities of `compare`: (windows, block_size) those in BY_TOKEN, (windows,) those in BY_WINDOW. reference: one of
    the names, or None to measure the losses alone; what is not measured is 0. Each process takes a share of the
    windows, and returns all of them."""
    own = starts[ranks.RANK :: ranks.WORLD]
    result = {}
    for name in models:
        result[name] = {key: np.zeros((len(own), block_size), np.float32) for key in BY_TOKEN}
        result[name] |= {key: np.zeros(len(own)) for key in BY_WINDOW}
    firsts = range(0, len(own), batch_size)
    for i in tqdm(firsts, "windows", unit="batch", leave=False, disable=None if ranks.RANK == 0 else True):
        x, y = read_windows(tokens, own[i : i + batch_size], block_size, device)
        targets = y.flatten()
        with autocast:
            hidden = {name: model.hidden(x).flatten(0, 1) for name, model in models.items()}  # (B T, C)
            if reference is None:
                found = {name: dict(loss=token_losses(m, hidden[name], targets)) for name, m in models.items()}
            else:
                found = compare(models, reference, hidden, targets)
        for name in models:
            for key, value in found[name].items():
                value = value.view(y.shape).cpu()
                result[name][key][i : i + batch_size] = value if key in BY_TOKEN else value.double().mean(-1)
    return {name: {key: ranks.gather_rows(array) for key, array in result[name].items()} for name in models}


def calibration_error(confidence, hit, bins=15):
    """confidence, hit (N,) -> expected calibration error (Guo et al., arXiv 1706.04599): tokens in bins of equal width
    by confidence, and the mean over tokens of |confidence - hits| of their bin. NaN if a confidence is not finite."""
    if not np.isfinite(confidence).all():
        return math.nan
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    apart = np.bincount(which, confidence - hit, bins)  # sums over a bin
    return np.abs(apart).sum() / len(confidence)


def mean_and_error(windows):
    """Windows' means (windows,) -> their mean and its standard error, in float64; NaN for a single window."""
    windows = windows.astype(np.float64)
    if len(windows) < 2:
        return windows.mean(), float("nan")
    return windows.mean(), windows.std(ddof=1) / np.sqrt(len(windows))


def cast_linear_maps(model):
    """Cast the linear maps to bfloat16 in place, once, as autocast would at each call. The unembedding stays in
    float32."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m is not model.lm_head:
            m.bfloat16()
