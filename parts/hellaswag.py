"""
HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest? For `eval.py --dataset=hellaswag`.

Completion style, as in the published figures: the context and " " + ending are tokenized separately. An ending's score
is the sum of its tokens' losses (accuracy) or their mean (length-normalised accuracy).

Each ending is a sequence of its own after the context, cut at the left if it is longer than the model's context window,
as in lm-evaluation-harness.
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
    most = model.config.block_size
    todo = []  # (ids, how many of them are the ending's, example, ending)
    for i, example in enumerate(examples):
        context = encode(example.context)
        for k, text in enumerate(example.endings):
            ending = encode(" " + text)
            todo.append(((context + ending)[-(most + 1) :], min(len(ending), most), i, k))
    todo.sort(key=lambda row: -len(row[0]))  # the longest first: if memory is too small, the first batch says so

    sums, counts = np.zeros((len(examples), 4)), np.zeros((len(examples), 4), int)
    with tqdm(total=len(todo), desc=name, unit="ending", leave=False, disable=None if name else True) as bar:
        while todo:
            longest = len(todo[0][0])
            n = max(1, piece_rows(model.lm_head.weight, BATCH_TOKENS) // longest)
            batch, todo = todo[:n], todo[n:]
            ids = np.full((len(batch), longest), model.config.eot)  # padded at the right, which no other token sees
            is_ending = np.zeros(ids.shape, bool)
            for row, (tokens, m, _, _) in enumerate(batch):
                ids[row, : len(tokens)] = tokens
                is_ending[row, len(tokens) - m : len(tokens)] = True
            ids, is_ending = torch.from_numpy(ids).to(device), torch.from_numpy(is_ending).to(device)[:, 1:]
            with autocast:  # only tokens that predict an ending's are unembedded
                losses = token_losses(model, model.hidden(ids[:, :-1])[is_ending], ids[:, 1:][is_ending])
            for (_, m, i, k), own in zip(batch, losses.cpu().double().split([row[1] for row in batch])):
                sums[i, k], counts[i, k] = own.sum(), m
            bar.update(len(batch))
    for i, example in enumerate(examples):  # equal endings get equal losses, so that the first wins
        sums[i] = sums[i, [example.endings.index(text) for text in example.endings]]
    return sums, counts


def accuracies(sums, counts, labels):
    """{"acc", "acc_se", "acc_norm", "acc_norm_se"}: shares that are right, and binomial errors. NaN if a loss is."""
    result = {}
    for key, losses in (("acc", sums), ("acc_norm", sums / counts)):
        right = np.mean(losses.argmin(1) == labels) if np.isfinite(losses).all() else float("nan")
        result |= {key: right, key + "_se": np.sqrt(right * (1 - right) / len(labels))}
    return result
