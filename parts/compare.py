"""
Several models on the same windows: each token's loss, and how far a model's next-token distribution
is from a reference's.
"""
import math

import numpy as np
import torch
from tqdm import tqdm

from model import HEAD_ROWS, pieces
from parts.data import read_windows
from parts.ranks import RANK


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
    """{name: {"loss", and where it is not the reference "kl", "js", "agree"}}, a value for each
    token, (N,) each.

    models: {name: GPT}; hidden: {name: what its unembedding reads, (N, C)}; targets (N,)."""
    found = {name: dict(loss=[], kl=[], js=[], agree=[]) for name in models}
    found[reference] = dict(loss=[])
    rows = zip(*(pieces(hidden[name], HEAD_ROWS) for name in models), pieces(targets, HEAD_ROWS))
    for *xs, y in rows:
        log_p = {}  # (rows, vocab) each
        for (name, model), x in zip(models.items(), xs):
            log_p[name] = model.exact_logits(x).log_softmax(-1)
        for name in models:
            found[name]["loss"].append(-log_p[name].gather(1, y.unsqueeze(1))[:, 0])
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
    """{name: {"loss": (windows, block_size), and against the reference "kl", "js", "agree":
    (windows,)}} of the windows of tokens that begin at starts (windows,). reference: a name of
    models, or None for the losses alone."""
    result = {name: dict(loss=np.zeros((len(starts), block_size), np.float32)) for name in models}
    if reference is not None:
        for name in models.keys() - {reference}:
            result[name] |= {key: np.zeros(len(starts)) for key in ("kl", "js", "agree")}
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
                result[name][key][i : i + batch_size] = value if key == "loss" else value.double().mean(-1)
    return result


def mean_and_error(windows):
    """Mean over the windows' means (windows,), and its standard error."""
    windows = windows.astype(np.float64)
    if len(windows) < 2:
        return windows.mean(), float("nan")
    return windows.mean(), windows.std(ddof=1) / np.sqrt(len(windows))


def cast_linear_maps(model):
    """What autocast to bfloat16 would do to the weights of the linear maps at each call, once; but for
    the unembedding, which stays in float32."""
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m is not model.lm_head:
            m.weight = torch.nn.Parameter(m.weight.bfloat16())
            if m.bias is not None:
                m.bias = torch.nn.Parameter(m.bias.bfloat16())
