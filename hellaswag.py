"""
HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest? What `eval.py --dataset=hellaswag` runs.

Completion style, as in the published LN-free models' figures: the context and " " + ending are tokenized apart, and an ending's score
is the sum of its tokens' losses (accuracy) or their mean (length-normalised accuracy). An example is one sequence, the context and
then the four endings, in which an ending's tokens see the context and themselves, at the positions that they would have alone: the
context is computed once. Where context and ending are longer than the model's positions, each ending gets a sequence of its own, cut
at the left, as lm-evaluation-harness does.
"""
import json
import os

import numpy as np
import requests
import torch
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
EXAMPLES = 10_042
BATCH_TOKENS = 2048  # padded tokens of a forward pass


def download(url, path):
    """Fetch url into path, once; go on where an earlier try broke off. OSError or ValueError, one line."""
    if os.path.exists(path):
        return
    half = path + ".tmp"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    have = os.path.getsize(half) if os.path.exists(half) else 0
    try:
        with requests.get(url, stream=True, timeout=30, headers={"Range": f"bytes={have}-"} if have else {}) as answer:
            if answer.status_code != 416:  # there is more than what we have
                answer.raise_for_status()
                with open(half, "ab" if answer.status_code == 206 else "wb") as f:
                    for part in answer.iter_content(4096):
                        f.write(part)
    except requests.RequestException as e:
        problem = f"the server answers {e.response.status_code}" if e.response is not None else type(e).__name__
        raise OSError(f"can't fetch {url} ({problem}): run it again to go on, or download it by hand to {path}") from None
    try:
        n = len(read_examples(half))
        if url == URL and n != EXAMPLES:
            raise ValueError(f"{url} has {n:,} examples, not {EXAMPLES:,}: download it by hand to {path}")
    except ValueError:
        os.remove(half)
        raise
    os.replace(half, path)


def read_examples(path):
    """[(context, [four endings], label)] of a file in the published format. ValueError that names the line."""
    examples = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                context, endings, label = row["ctx"], row["endings"], int(row["label"])
                texts = [context, *endings] if isinstance(endings, list) else []
                if len(texts) != 5 or not all(isinstance(text, str) and text for text in texts) or label not in range(4):
                    raise ValueError("it needs a ctx, four endings and a label from 0 to 3")
                examples.append((context, endings, label))
            except (ValueError, KeyError, TypeError) as e:
                problem = "is empty" if not line.strip() else f"is not an example of HellaSwag ({type(e).__name__}: {e})"
                raise ValueError(f"{path}, line {n} {problem}: remove the file to fetch it again") from None
    if not examples:
        raise ValueError(f"{path} is empty: remove it to fetch it again")
    return examples


def sequences(examples, encode, block_size):
    """[(context ids, [(example, ending, ids)])]: one for each example, or for each ending where they don't fit."""
    found = []
    for i, (context, texts, _) in enumerate(examples):
        context, endings = encode(context), [(i, k, encode(" " + text)) for k, text in enumerate(texts)]
        if len(context) + max(len(ids) for *_, ids in endings) <= block_size + 1:
            found.append((context, endings))
            continue
        for i, k, ids in endings:
            whole, n = (context + ids)[-(block_size + 1) :], min(len(ids), block_size)
            found.append((whole[:-n], [(i, k, whole[-n:])]))
    return found


def lay_out(batch, eot):
    """A batch of sequences -> ids, positions and parts (B, T): 0 for the context, k for its k-th ending, -1 for padding; and of each
    scored token (M,): the row and column that predict it, its id, its example and ending."""
    T = max(len(context) + sum(len(ids) - 1 for *_, ids in endings) for context, endings in batch)
    ids, pos, part = np.full((len(batch), T), eot), np.zeros((len(batch), T), int), np.full((len(batch), T), -1)
    scored = []
    for row, (context, endings) in enumerate(batch):
        n = at = len(context)
        ids[row, :n], pos[row, :n], part[row, :n] = context, np.arange(n), 0
        for k, (i, ending, tokens) in enumerate(endings, 1):
            m = len(tokens) - 1  # the last one predicts nothing
            ids[row, at : at + m], pos[row, at : at + m], part[row, at : at + m] = tokens[:-1], np.arange(n, n + m), k
            scored += [(row, column, token, i, ending) for column, token in zip([n - 1, *range(at, at + m)], tokens)]
            at += m
    return ids, pos, part, np.array(scored).T


@torch.inference_mode()
def score(model, examples, encode, device, context, name=""):
    """The four endings' summed losses and their token counts, (examples, 4) each. context: of autocast."""
    todo = sequences(examples, encode, model.config.block_size)
    length = lambda item: len(item[0]) + sum(len(ids) - 1 for *_, ids in item[1])
    todo.sort(key=length, reverse=True)  # the longest first: it is known at once whether they fit into memory
    sums, counts = np.zeros((len(examples), 4)), np.zeros((len(examples), 4), int)
    bar = tqdm(total=len(todo), desc=name, unit="example", leave=False, disable=None if name else True)
    while todo:
        n = max(1, BATCH_TOKENS // length(todo[0]))
        batch, todo = todo[:n], todo[n:]
        ids, pos, part, (row, column, target, example, ending) = lay_out(batch, model.config.eot)
        ids, pos, part = (torch.from_numpy(a).to(device) for a in (ids, pos, part))
        T = ids.shape[1]
        own = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])  # (B, query, key)
        mask = own & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        with context:
            x = model.normed(*model.residual(ids, pos, mask[:, None]))[row, column]  # (M, C): only what is scored is unembedded
            loss = model.token_losses(x, torch.from_numpy(target).to(device)).cpu().double().numpy()
        np.add.at(sums, (example, ending), loss)
        np.add.at(counts, (example, ending), 1)
        bar.update(len(batch))
    bar.close()
    return sums, counts


def accuracies(sums, counts, labels):
    """{"acc", "acc_se", "acc_norm", "acc_norm_se"}: shares of right predictions, with binomial standard errors; NaN if a loss is."""
    result = {}
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = np.mean(losses.argmin(1) == labels) if np.isfinite(losses).all() else float("nan")
        result |= {key: right, key + "_se": np.sqrt(right * (1 - right) / len(labels))}
    return result
