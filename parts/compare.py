"""
Several models on the same windows: each token's loss, and how far a model's next-token distribution is from a
reference model's.
"""
import math
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from parts.data import read_windows
from parts.loss import EVAL_ROWS, exact_logits, pieces, token_losses
from parts.ranks import RANK

BY_TOKEN = ("loss", "confidence", "hit")  # kept for each token; of the rest only a window's mean


def divergences(log_q, log_p):
    """Log-probabilities (rows, vocab) of a reference q and a model p -> KL(q || p) and the Jensen-Shannon divergence
    in nats, and whether both have the same top token, (rows,) each."""
    q, p = log_q.exp(), log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)  # the mixture (p + q) / 2
    kl = (q * (log_q - log_p)).sum(-1)
    js = ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1)) / 2
    return kl, js, log_p.argmax(-1) == log_q.argmax(-1)


def compare(models, reference, hidden, targets):
    """{name: {"loss"; "confidence", the top token's probability; "hit", whether that token is the target; "entropy" in
    nats; and for all but the reference "kl", "js", "agree"}}, (N,) each.

    models: {name: GPT}; reference: one of the names; hidden: {name: what the unembedding reads, (N, C)}."""
    found = {name: defaultdict(list) for name in models}
    for *xs, y in zip(*(pieces(hidden[name], EVAL_ROWS) for name in models), pieces(targets, EVAL_ROWS)):
        log_probs = {name: exact_logits(model, x).log_softmax(-1) for (name, model), x in zip(models.items(), xs)}
        for name, log_p in log_probs.items():  # (rows, vocab)
            best, top = log_p.max(-1)
            values = dict(loss=-log_p.gather(1, y.unsqueeze(1))[:, 0], confidence=best.exp(), hit=top == y,
                          entropy=-(log_p.exp() * log_p).sum(-1))
            if name != reference:
                values |= zip(("kl", "js", "agree"), divergences(log_probs[reference], log_p))
            for key, value in values.items():
                found[name][key].append(value)
    return {name: {key: torch.cat(rows) for key, rows in values.items()} for name, values in found.items()}


@torch.inference_mode()
def measure(models, reference, tokens, starts, block_size, batch_size, device, autocast):
    """{name: {"loss", "confidence", "hit": (windows, block_size); "entropy", "kl", "js", "agree": (windows,)}}, as in
    compare, over the windows of tokens that begin at starts (windows,).

    models: {name: GPT}; reference: one of the names, or None for the losses alone."""
    keys = ("loss",) if reference is None else (*BY_TOKEN, "entropy", "kl", "js", "agree")
    shape = len(starts), block_size
    found = {name: {key: np.zeros(shape, np.float32) if key in BY_TOKEN else np.zeros(len(starts))
                    for key in keys[: 4 if name == reference else 7]} for name in models}
    firsts = range(0, len(starts), batch_size)
    for i in tqdm(firsts, "windows", unit="batch", leave=False, disable=None if RANK == 0 else True):
        x, y = read_windows(tokens, starts[i : i + batch_size], block_size, device)
        targets = y.flatten()
        with autocast:
            hidden = {name: model.hidden(x).flatten(0, 1) for name, model in models.items()}  # (B T, C)
            if reference is None:
                values = {name: dict(loss=token_losses(m, hidden[name], targets)) for name, m in models.items()}
            else:
                values = compare(models, reference, hidden, targets)
        for name in models:
            for key, value in values[name].items():
                value = value.view(y.shape).cpu()
                found[name][key][i : i + batch_size] = value if key in BY_TOKEN else value.double().mean(-1)
    return found


def calibration_error(confidence, hit, bins=15):
    """Expected calibration error (Guo et al., arXiv 1706.04599) over tokens (N,), in bins of equal width by
    confidence: the mean of |confidence - share of hits|, weighted by tokens. NaN if a confidence is."""
    if not np.isfinite(confidence).all():
        return math.nan
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.abs(np.bincount(which, confidence - hit, bins)).sum() / len(confidence)


def mean_and_error(windows):
    """The windows' values (windows,) -> their mean and its standard error, NaN for a single window. In float64."""
    windows = windows.astype(np.float64)
    error = windows.std(ddof=1) / np.sqrt(len(windows)) if len(windows) > 1 else math.nan
    return windows.mean(), error


def with_error(value, error, form):
    """A number and its error, each None if there is none, as text: "+0.0270 ± 0.0009", or ""."""
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def cast_linear_maps(model):
    """Cast the linear maps, but not the unembedding, to bfloat16, in place: autocast would do it at each call."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m is not model.lm_head:
            m.weight = torch.nn.Parameter(m.weight.bfloat16())
            if m.bias is not None:
                m.bias = torch.nn.Parameter(m.bias.bfloat16())
