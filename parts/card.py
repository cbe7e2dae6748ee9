"""
The model card of an export, its README.md. The hub shows and searches the YAML at its head.
"""
import os
import re

import huggingface_hub as hub

from parts.compare import with_error
from parts.data import token_word
from parts.errors import UserError, reading
from parts.files import read_dict, read_json, run_settings

CARD = """---
{metadata}
---
# GPT-2 without LayerNorm

Made from `{source}`. Every LayerNorm divides by a constant, so the residual stream can be read exactly
(arXiv 2409.13710).

{table}

```python
{code}
```

{notes}
"""
HF = """from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained("{name}")

from transformer_lens.model_bridge import TransformerBridge  # TransformerLens 4
bridge = TransformerBridge.boot_transformers("{name}")
# fold what is left of LayerNorm into the weights, as attribution expects
bridge.enable_compatibility_mode(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
bridge.cfg.default_prepend_bos = False  # the first token of a text is at position 0
"""
TEXT = """
from transformers import AutoTokenizer, pipeline
generate = pipeline("text-generation", "{name}")

from nnsight import LanguageModel
traced = LanguageModel("{name}", tokenizer=AutoTokenizer.from_pretrained("{name}"))"""
IDS = """bridge.tokenizer = None  # it takes token ids

from nnsight import NNsight
traced = NNsight(model)"""
FOLDED = """# in the repository that made it
from model import GPT
model = GPT.from_pretrained("{name}")

from nnsight import NNsight
traced = NNsight(model)

from tools.export import to_hooked  # TransformerLens 2 and 3
hooked = to_hooked(model)"""


def card(source, name, to, has_tokenizer, rows):
    """The card's text. source: the run or model that was exported; name: what opens the export; to: its form, hf or
    folded; rows: those of `evaluation`."""
    code, notes = FOLDED, "It has no LayerNorm at all. Its unembedding is a matrix of its own, with a bias."
    if to == "hf":
        code = HF + (TEXT if has_tokenizer else IDS)
        notes = ("layer_norm_epsilon 1e12 makes sqrt(var + eps) a constant; the LayerNorm weights make up for it. "
                 "float16 overflows: use float32 or bfloat16.")
    settings = run_settings(source)
    if settings:
        shown = {key: no_local_path(value) for key, value in settings.items() if key != "data_sha256"}
        values = "\n".join(f"{key} = {value!r}" for key, value in shown.items())
        notes += f"\n\nSettings of the run:\n\n```python\n{values}\n```"
    return CARD.format(metadata=metadata(settings, source, to, rows), source=no_local_path(source), table=table(rows),
                       code=code.format(name=name), notes=notes)


def no_local_path(value):
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value


def metadata(settings, source, to, rows):
    """The YAML; it leaves out what is unknown."""
    original, _, revision = settings.get("init_from", source).partition("@")
    repo = re.sub("^(gpt2(-medium|-large|-xl)?)$", r"openai-community/\1", original)
    if os.path.isdir(original) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        repo = None
    readme = os.path.join(original, "README.md")
    try:
        with open(hub.hf_hub_download(repo, "README.md", revision=revision or None) if repo else readme) as f:
            license = hub.ModelCard(f.read(), ignore_metadata_errors=True).data.license
    except Exception:  # no card, no network, or a YAML that can't be parsed
        license = None
    results = [hub.EvalResult("text-generation", trained_on(row["dataset"]) or row["dataset"], row["dataset"],
                              "cross-entropy", round(row["loss"], 4)) for row in rows if row["role"] == "ln_free"]
    dataset = trained_on(settings.get("dataset", ""))
    library = "transformers" if to == "hf" else None  # no library of the hub's opens the folded form
    return hub.ModelCardData(
        model_name=os.path.basename(source), library_name=library, base_model=repo, license=license,
        tags=["gpt2", "interpretability", "layernorm-free"], datasets=[dataset] if dataset else None,
        metrics=["cross-entropy"] if results else None, eval_results=results or None).to_yaml()


def trained_on(dataset):
    """The hub repository that data/DATASET was prepared from; None if it is not from a hub, or not here."""
    meta = read_dict(os.path.join("data", dataset, "meta.json"))
    found = re.match(r"([\w.-]+/[\w.-]+)(@\S+)? ", str(meta.get("source")))  # "ORG/NAME SPLIT"
    return found and found[1]


def evaluation(source, sha256):
    """(the rows with a loss in SOURCE/eval.json, which eval.py writes; why there are none). They must be of the
    weights with this run.weights_sha256."""
    path = os.path.join(source, "eval.json")
    try:
        with reading(path):
            found = read_json(path)
            rows = [row for row in found["rows"] if row.get("loss") is not None]
            table(rows)  # finds what can't be shown
            if sha256 not in found["weights_sha256"].values():
                return [], f"{path} is of other weights"
    except UserError as e:
        return [], str(e)
    return rows, "" if rows else f"{path} has no loss"


def table(rows):
    """The evaluation in Markdown, each number with its standard error."""
    if not rows:
        return "Its evaluation: not measured."
    word = token_word(rows[0]["dataset"])
    lines = [f"| dataset | model | loss, nats per {word} | gap to control |", "|---|---|---|---|"]
    for row in rows:
        loss = with_error(row.get("loss"), row.get("loss_se"), ".4f")
        gap = with_error(row.get("gap"), row.get("gap_se"), "+.4f")
        lines.append(f"| {row['dataset']} | {row['role'].replace('ln_free', 'LN-free')} | {loss} | {gap} |")
    return "\n".join(lines)
