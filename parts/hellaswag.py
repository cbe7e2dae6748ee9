"""
HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest? What `eval.py
--dataset=hellaswag` runs.

Completion style, as in the published LN-free models' figures: the context and " " + ending are
tokenized apart, and an ending's score is the sum of its tokens' losses (accuracy) or their mean
(length-normalised accuracy).

The context of an example is computed once. An example is one sequence, the context and then the
four endings, in which an ending's tokens see the context and themselves, at the positions that they
would have alone. Where context and ending are longer than the model's positions, each ending gets a
sequence of its own, cut at the left, as lm-evaluation-harness does.
"""
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from model import piece_rows
from parts import jsonfile
from parts.errors import UserError, on_disk

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
EXAMPLES = 10_042  # in the file at URL
BATCH_TOKENS = 2048  # padded tokens of a forward pass, on a CPU; see piece_rows


@dataclass
class Example:
    context: str
    endings: list[str]
    label: int  # of the right ending


@dataclass
class Sequence:
    """Token ids of a context, and of the endings that follow it; whose[k] is the (example, ending)
    of endings[k]."""

    context: list[int]
    endings: list[list[int]]
    whose: list[tuple[int, int]]

    def __len__(self):
        return len(self.context) + sum(len(ids) - 1 for ids in self.endings)  # an ending's last token predicts nothing


# --- the file


def download(url, path):
    """Fetch url into path, once; go on where an earlier try broke off. UserError."""
    import requests

    if os.path.exists(path):
        return
    half = path + ".tmp"
    with on_disk(f"can't write {path}"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with on_disk(f"can't write {half}"):
        try:
            fetch_rest(url, half)
        except requests.RequestException as e:  # an OSError too, but the network's
            problem = f"the server answers {e.response.status_code}" if e.response is not None else type(e).__name__
            raise UserError(f"can't fetch {url} ({problem}): run it again to go on, "
                            f"or download it by hand to {path}") from None
    try:
        n = len(read_examples(half))
        if url == URL and n != EXAMPLES:
            raise UserError(f"{url} has {n:,} examples, not {EXAMPLES:,}: download it by hand to {path}")
    except UserError:
        os.remove(half)
        raise
    os.replace(half, path)


def fetch_rest(url, half):
    """Append to the file what it does not hold yet. requests.RequestException, or OSError of the disk."""
    import requests

    have = os.path.getsize(half) if os.path.exists(half) else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, stream=True, timeout=30, headers=headers) as answer:
        if answer.status_code == 416:  # there is no more than what we have
            return
        answer.raise_for_status()
        mode = "ab" if answer.status_code == 206 else "wb"
        with open(half, mode) as f:
            for part in answer.iter_content(4096):
                if f.tell() > jsonfile.LARGEST:  # it never ends
                    return
                f.write(part)


def read_examples(path):
    """[Example] of a file in the published format. UserError that names the line."""
    if os.path.getsize(path) > jsonfile.LARGEST:
        raise UserError(f"{path} is far larger than HellaSwag: remove it to fetch it again")
    examples = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for n, line in enumerate(f, 1):
            try:
                examples.append(parse(line))
            except (ValueError, KeyError, TypeError, OverflowError) as e:
                problem = f"is not an example of HellaSwag ({type(e).__name__}: {e})" if line.strip() else "is empty"
                raise UserError(f"{path}, line {n} {problem}: remove the file to fetch it again") from None
    if not examples:
        raise UserError(f"{path} is empty: remove it to fetch it again")
    return examples


def parse(line):
    row = jsonfile.parse(line)
    example = Example(row["ctx"], row["endings"], int(row["label"]))
    endings = example.endings if isinstance(example.endings, list) else []
    texts = [example.context, *endings]
    whole = len(texts) == 5 and all(isinstance(text, str) and text for text in texts)
    if not whole or example.label not in range(4):
        raise ValueError("it needs a ctx, four endings and a label from 0 to 3")
    return example


# --- the scores


@torch.inference_mode()
def score(model, examples, encode, device, autocast, name=""):
    """The four endings' summed losses and their token counts, (examples, 4) each. encode: text ->
    ids; name: of a progress bar."""
    todo = sequences(examples, encode, model.config.block_size)
    todo.sort(key=len, reverse=True)  # the longest first: it is known at once whether they fit into memory
    sums = np.zeros((len(examples), 4))
    counts = np.zeros((len(examples), 4), int)
    bar = tqdm(total=len(todo), desc=name, unit="example", leave=False, disable=None if name else True)
    while todo:
        n = max(1, piece_rows(model.lm_head.weight, BATCH_TOKENS) // len(todo[0]))
        batch, todo = todo[:n], todo[n:]
        with autocast:
            losses, whose = batch_losses(model, batch, device)
        np.add.at(sums, whose, losses)
        np.add.at(counts, whose, 1)
        bar.update(len(batch))
    bar.close()
    for i, example in enumerate(examples):  # of equal endings the first wins, whatever rounding says
        first = [example.endings.index(text) for text in example.endings]
        sums[i] = sums[i, first]
    return sums, counts


def sequences(examples, encode, block_size):
    """[Sequence]: one for each example, or one for each of its endings where they don't fit."""
    found = []
    for i, example in enumerate(examples):
        context = encode(example.context)
        endings = [encode(" " + text) for text in example.endings]
        if len(context) + max(map(len, endings)) <= block_size + 1:
            found.append(Sequence(context, endings, [(i, k) for k in range(len(endings))]))
            continue
        for k, ids in enumerate(endings):
            whole = (context + ids)[-(block_size + 1) :]
            n = min(len(ids), block_size)
            found.append(Sequence(whole[:-n], [whole[-n:]], [(i, k)]))
    return found


def batch_losses(model, batch, device):
    """A batch of Sequences -> each scored token's loss (M,), and whose it is: (M,) examples and
    (M,) endings."""
    B, T = len(batch), max(map(len, batch))
    ids = np.full((B, T), model.config.eot)
    pos = np.zeros((B, T), int)
    part = np.full((B, T), -1)  # 0: the context, k: its k-th ending, -1: padding
    # of each scored token: the (row, column) that predicts it, its id, its (example, ending)
    at, target, whose = [], [], []
    for row, sequence in enumerate(batch):
        n = end = len(sequence.context)
        ids[row, :n], pos[row, :n], part[row, :n] = sequence.context, np.arange(n), 0
        for k, ending in enumerate(sequence.endings):
            begin, end = end, end + len(ending) - 1
            ids[row, begin:end] = ending[:-1]
            pos[row, begin:end] = np.arange(n, n + end - begin)
            part[row, begin:end] = k + 1
            # the context's last token predicts an ending's first
            at += [(row, column) for column in (n - 1, *range(begin, end))]
            target += ending
            whose += [sequence.whose[k]] * len(ending)
    ids, pos, part = (torch.from_numpy(a).to(device) for a in (ids, pos, part))
    in_context = part[:, None, :] == 0
    own_ending = part[:, None, :] == part[:, :, None]  # (B, query, key)
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    x = model.hidden(ids, pos, ((in_context | own_ending) & causal)[:, None])  # (B, T, C)
    rows, columns = np.array(at).T
    # only what is scored is unembedded
    losses = model.token_losses(x[rows, columns], torch.tensor(target, device=device))
    return losses.cpu().double().numpy(), tuple(np.array(whose).T)


def accuracies(sums, counts, labels):
    """{"acc", "acc_se", "acc_norm", "acc_norm_se"}: shares of right predictions, with binomial
    standard errors; NaN if a loss is."""
    result = {}
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = np.mean(losses.argmin(1) == labels) if np.isfinite(losses).all() else float("nan")
        result |= {key: right, key + "_se": np.sqrt(right * (1 - right) / len(labels))}
    return result
