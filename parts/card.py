"""
The model card of an export, its README.md. The hub shows and searches the YAML at its head.
"""
import os
import re

import huggingface_hub as hub

from parts.errors import UserError, reading
from parts.files import read_dict, read_json, run_settings

CARD = """---
{metadata}
---
# GPT-2 without LayerNorm

Made from `{source}`. Every LayerNorm divides by a constant, so that the residual stream can be read affinely
(arXiv 2409.13710).

{table}

```python
{lines}
```

{note}
"""
HF = """from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained("{name}")

from transformer_lens.model_bridge import TransformerBridge  # TransformerLens 4
bridge = TransformerBridge.boot_transformers("{name}")
# fold what is left of LayerNorm into the weights, as attribution expects
bridge.enable_compatibility_mode(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
"""
WITH_TOKENIZER = """
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained("{name}")
generate = pipeline("text-generation", model, tokenizer=tokenizer)

from nnsight import LanguageModel
traced = LanguageModel("{name}", tokenizer=tokenizer)"""
WITHOUT_TOKENIZER = """bridge.tokenizer = None  # it takes token ids

from nnsight import NNsight
traced = NNsight(model)"""
FOLDED = """from model import GPT  # in the repository that made it
model = GPT.from_pretrained("{name}")

from nnsight import NNsight
traced = NNsight(model)

from tools.export import to_hooked  # TransformerLens 2 and 3
hooked = to_hooked(model)"""


def card(source, name, to, eps, dtype, has_tokenizer, rows):
    """The text of the card. source: the run or model that was exported; name: what opens the export; to: its form, hf
    or folded; rows: those of `evaluation`."""
    lines, note = FOLDED, "It has no LayerNorm at all; its unembedding is not tied, and has a bias."
    if to == "hf":
        lines = HF + (WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER)
        note = f"layer_norm_epsilon = {eps:g} makes sqrt(var + eps) a constant; the LayerNorm weights make up for it."
        note += "" if dtype == "float16" else " In float16 they overflow: use float32 or bfloat16."
    settings = run_settings(source)
    if settings:
        values = "\n".join(f"{key} = {value!r}" for key, value in settings.items() if key != "data_sha256")
        note += f"\n\nSettings of the run:\n\n```python\n{values}\n```"
    return CARD.format(metadata=metadata(settings, source, to, rows), source=source, table=table(rows),
                       lines=lines.format(name=name), note=note)


def metadata(settings, source, to, rows):
    """The YAML at the head; what is unknown is left out."""
    original, dataset = settings.get("init_from", source), trained_on(settings.get("dataset", ""))
    repo = re.sub("^(gpt2(-medium|-large|-xl)?)$", r"openai-community/\1", original.partition("@")[0])
    if os.path.isdir(original) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        repo = None
    try:
        path = repo or os.path.join(original, "README.md")
        license = hub.ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:  # no card, no network, or whatever is wrong in a stranger's YAML
        license = None
    results = [hub.EvalResult("text-generation", trained_on(row["dataset"]) or row["dataset"], row["dataset"],
                              "cross-entropy", round(row["loss"], 4), metric_name="nats per token")
               for row in rows if row["role"] == "ln_free"]
    return hub.ModelCardData(
        library_name="transformers" if to == "hf" else None, tags=["gpt2", "interpretability", "layernorm-free"],
        base_model=repo, license=license, datasets=dataset and [dataset], eval_results=results or None,
        metrics=["cross-entropy"] if results else None, model_name=os.path.basename(source)).to_yaml()


def trained_on(dataset):
    """The hub repository that data/DATASET was prepared from; None if it was none, or is unknown."""
    meta = read_dict(os.path.join("data", dataset, "meta.json"))
    found = re.match(r"([\w.-]+/[\w.-]+)(@\S+)? ", str(meta.get("source")))  # "ORG/NAME SPLIT"
    return found and found[1]


def evaluation(source, sha256):
    """(the rows with a loss in SOURCE/eval.json, which eval.py writes; why there are none). sha256: run.weights_sha256
    of the model that they must be of."""
    path = os.path.join(source, "eval.json")
    try:
        with reading(path):
            found = read_json(path)
            rows = [row for row in found["rows"] if row.get("loss") is not None]
            table(rows)  # a row that can't be shown is an error here
            if sha256 not in found["weights_sha256"].values():
                raise ValueError("its models have other weights")
    except UserError as e:
        return [], str(e)
    return rows, "" if rows else f"{path} has no loss"


def table(rows):
    """The evaluation in Markdown."""
    lines = ["| dataset | model | loss, nats per token | gap to control |", "|---|---|---|---|"]
    for row in rows:
        cells = [row["dataset"], row["role"].replace("ln_free", "LN-free")]
        for key, form in (("loss", ".4f"), ("gap", "+.4f")):
            number, error = row.get(key), row.get(key + "_se")
            cells.append("" if number is None else f"{number:{form}}" + ("" if error is None else f" ± {error:.4f}"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if rows else "Its evaluation: not measured."
