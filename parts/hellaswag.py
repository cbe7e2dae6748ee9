"""
HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest? For `eval.py --dataset=hellaswag`.

Completion style, as in the published figures: the context and " " + ending are tokenized separately. An ending's score
is the sum of its tokens' losses (accuracy) or their mean (length-normalised accuracy).

An example is one sequence, the context and then its four endings, so that the context is computed once. A token of an
ending sees the context and its own ending, at the positions that it would have alone. If context and ending are longer
than the model's context window, each ending gets a sequence of its own, cut at the left, as in lm-evaluation-harness.
"""
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from parts.errors import on_disk, reading
from parts.files import whole_file
from parts.loss import piece_rows, token_losses

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
PATH = os.path.join("data", "hellaswag", "hellaswag_val.jsonl")
BATCH_TOKENS = 2048  # in a forward pass on a CPU, padding included; see piece_rows


@dataclass
class Example:
    context: str
    endings: list[str]
    label: int  # index of the right ending


@dataclass
class Sequence:
    """Token ids of a context and of the endings after it; whose[k] is the (example, ending) of endings[k]."""

    context: list[int]
    endings: list[list[int]]
    whose: list[tuple[int, int]]

    def __len__(self):
        return len(self.context) + sum(len(ids) - 1 for ids in self.endings)  # an ending's last token predicts nothing


# --- the file


def fetch_examples():
    """[Example] of PATH, which is downloaded once. UserError."""
    if not os.path.exists(PATH):
        import requests

        with reading(URL, f"run it again, or download it by hand to {PATH}"):
            answer = requests.get(URL, timeout=30)
            answer.raise_for_status()
        with on_disk(f"can't write {PATH}"):
            os.makedirs(os.path.dirname(PATH), exist_ok=True)
        with whole_file(PATH, check=read_examples) as f:
            f.write(answer.content)
    return read_examples(PATH)


def read_examples(path):
    """[Example] of a file in the published format. UserError that names the line."""
    advice = "remove the file to fetch it again"
    examples = []
    with reading(path, advice), open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            with reading(f"{path}, line {n}", advice):
                row = json.loads(line)
                example = Example(row["ctx"], row["endings"], int(row["label"]))
                texts = [example.context, *example.endings]
                if len(texts) != 5 or not all(map(str.encode, texts)) or example.label not in range(4):
                    raise ValueError("an example has a ctx, four endings and a label from 0 to 3")
                examples.append(example)
        if not examples:
            raise ValueError("it is empty")
    return examples


# --- the scores


@torch.inference_mode()
def score(model, examples, encode, device, autocast, name=""):
    """The four endings' summed losses and their token counts, (examples, 4) each. encode: text -> ids; name: of the
    progress bar, "" for none."""
    # the longest first: if memory is too small, the first batch says so
    todo = sorted(sequences(examples, encode, model.config.block_size), key=len, reverse=True)
    sums, counts = np.zeros((len(examples), 4)), np.zeros((len(examples), 4), int)
    with tqdm(total=len(todo), desc=name, unit="example", leave=False, disable=None if name else True) as bar:
        while todo:
            n = max(1, piece_rows(model.lm_head.weight, BATCH_TOKENS) // len(todo[0]))
            batch, todo = todo[:n], todo[n:]
            with autocast:
                losses, whose = batch_losses(model, batch, device)
            np.add.at(sums, whose, losses)
            np.add.at(counts, whose, 1)
            bar.update(len(batch))
    for i, example in enumerate(examples):  # equal endings get equal losses, so that the first wins
        sums[i] = sums[i, [example.endings.index(text) for text in example.endings]]
    return sums, counts


def sequences(examples, encode, block_size):
    """[Sequence]: one for each example, or one for each of its endings if they don't fit into block_size."""
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
    """A batch of Sequences -> each scored token's loss (M,), and its example and ending, (M,) each."""
    B, T = len(batch), max(map(len, batch))
    ids = np.full((B, T), model.config.eot)
    pos = np.zeros((B, T), int)
    part = np.full((B, T), -1)  # 0: context, k: k-th ending, -1: padding
    # for each scored token: the (row, column) that predicts it, its id, its (example, ending)
    at, target, whose = [], [], []
    for row, sequence in enumerate(batch):
        n = end = len(sequence.context)
        ids[row, :n], pos[row, :n], part[row, :n] = sequence.context, np.arange(n), 0
        for k, ending in enumerate(sequence.endings):
            begin, end = end, end + len(ending) - 1
            ids[row, begin:end] = ending[:-1]
            pos[row, begin:end] = np.arange(n, n + end - begin)
            part[row, begin:end] = k + 1
            at += [(row, column) for column in (n - 1, *range(begin, end))]  # n - 1: the context's last token
            target += ending
            whose += [sequence.whose[k]] * len(ending)
    ids, pos, part = (torch.from_numpy(a).to(device) for a in (ids, pos, part))
    in_context = part[:, None, :] == 0
    own_ending = part[:, None, :] == part[:, :, None]  # (B, query, key)
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    x = model.hidden(ids, pos, ((in_context | own_ending) & causal)[:, None])  # (B, T, C)
    rows, columns = np.array(at).T
    # only tokens that predict a scored one are unembedded
    losses = token_losses(model, x[rows, columns], torch.tensor(target, device=device))
    return losses.cpu().double().numpy(), tuple(np.array(whose).T)


def accuracies(sums, counts, labels):
    """{"acc", "acc_se", "acc_norm", "acc_norm_se"}: shares of right predictions and their binomial standard errors.
    NaN if a loss is."""
    result = {}
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = np.mean(losses.argmin(1) == labels) if np.isfinite(losses).all() else float("nan")
        result |= {key: right, key + "_se": np.sqrt(right * (1 - right) / len(labels))}
    return result
