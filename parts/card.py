"""
The model card of an export: what it is, where it comes from, its evaluation and settings, and how to
open it. The head is the hub's own metadata.
"""
import os
import re

import huggingface_hub as hub

from parts import jsonfile
from parts.errors import UserError
from parts.files import run_settings
from parts.sources import HUB

OPEN_HF = """
```python
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained("{name}")

from transformer_lens.model_bridge import TransformerBridge  # TransformerLens 4
bridge = TransformerBridge.boot_transformers("{name}")
# folds what is left of LayerNorm into the weights, as attribution expects
bridge.enable_compatibility_mode(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
"""
WITH_TOKENIZER = """
from transformers import AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained("{name}")
generate = pipeline("text-generation", "{name}")

from nnsight import LanguageModel
traced = LanguageModel("{name}", tokenizer=tokenizer)
```
"""
WITHOUT_TOKENIZER = """bridge.tokenizer = None  # it takes token ids

from nnsight import NNsight
traced = NNsight(model)
```
"""
FORM_HF = """
Its LayerNorm modules have layer_norm_epsilon = {eps:g}, which makes sqrt(var + eps) a constant,
and weights that make up for it. {float16}
"""
OPEN_FOLDED = """
```python
from model import GPT  # of the repository that made it
model = GPT.from_pretrained("{name}")

from nnsight import NNsight
traced = NNsight(model)

from export import to_hooked  # TransformerLens 2 and 3
hooked = to_hooked(model)
```

There is no LayerNorm in it; the unembedding is its own matrix, with a bias.
"""
ALIASES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of openai-community's


def how_to_open(name, to, has_tokenizer, eps, dtype):
    """The card's lines of Python, and what the form is."""
    if to == "folded":
        return OPEN_FOLDED.format(name=name)
    float16 = "float16 works too." if dtype == "float16" else "float16 overflows: use float32 or bfloat16."
    lines = OPEN_HF + (WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER) + FORM_HF
    return lines.format(name=name, eps=eps, float16=float16)


def card(source, name, to, opening, rows):
    """The text of README.md. source: the run or model that was exported; name: where the export will
    be; to: its form; opening: what how_to_open gives; rows: its evaluation."""
    settings = run_settings(source)
    run = settings.pop("run", None)
    settings.pop("data_sha256", None)
    lines = [
        "---", metadata(settings.get("init_from", source), settings.get("dataset"), name, to, rows), "---",
        "# GPT-2 without LayerNorm", "",
        f"Made from `{source}`: every LayerNorm divides by a constant, "
        "so that the residual stream is read affinely (arXiv 2409.13710).",
        *table(rows),
        opening,
    ]
    if settings:
        lines += [f"Settings of the run{f' {run}' if run else ''}:", "", "```python"]
        lines += [f"{key} = {value!r}" for key, value in settings.items()]
        lines += ["```"]
    return "\n".join(lines) + "\n"


def metadata(original, dataset, name, to, rows):
    """The YAML at the card's head: what is not known is left out. The folded form opens in no library that
    the hub knows."""
    results = []
    for row in rows:
        if row["role"] == "ln_free":
            results.append(hub.EvalResult(
                task_type="text-generation",
                dataset_type=HUB.get(row["dataset"], row["dataset"]),
                dataset_name=row["dataset"],
                metric_type="cross-entropy",
                metric_name="nats per token",
                metric_value=round(row["loss"], 4),
            ))
    return hub.ModelCardData(
        library_name="transformers" if to == "hf" else None,
        tags=["gpt2", "interpretability", "layernorm-free"],
        base_model=repository(original),
        license=license_of(original),
        datasets=trained_on(dataset),
        metrics=["cross-entropy"] if results else None,
        model_name=os.path.basename(name),
        eval_results=results or None,
    ).to_yaml()


def repository(source):
    """The hub repository that a source names; None: it is a directory here."""
    source = source.partition("@")[0]
    if os.path.isdir(source) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return None
    return f"openai-community/{source}" if source in ALIASES else source


def license_of(original):
    """The license that the original's own card names; None if that is not there or can't be asked."""
    path = os.path.join(original, "README.md")
    if not os.path.isdir(original):
        repo, revision = repository(original), original.partition("@")[2]
        if repo is None:
            return None
        try:
            path = hub.hf_hub_download(repo, "README.md", revision=revision or None)
        except Exception:  # of many kinds
            return None
    try:
        return hub.ModelCard.load(path, ignore_metadata_errors=True).data.license
    except Exception:  # whatever yaml finds wrong in a stranger's card
        return None


def trained_on(dataset):
    """[the hub repository that data/DATASET was prepared from]; None if it was none."""
    source = str(jsonfile.read_dict(os.path.join("data", dataset or "", "meta.json")).get("source")).partition(" ")[0]
    repo = source.partition("@")[0]
    of_hub = repo in HUB.values() or (repo.count("/") == 1 and repo.endswith(f"/{dataset}"))
    return [repo] if of_hub and not os.path.exists(repo) else None


def evaluation(source, sha256):
    """(the rows with a loss that `eval.py --json=SOURCE/eval.json` left, why there are none). They must be of weights
    with this sha256, run.weights_sha256's."""
    path = os.path.join(source, "eval.json")
    number = dict.fromkeys(("loss?", "loss_se?", "gap?", "gap_se?"), float)
    if not os.path.exists(path):
        return [], f"there is no {path}"
    try:
        found = jsonfile.read(path, dict(rows=list, weights_sha256=dict), "")
        rows = [row for row in found["rows"] if isinstance(row, dict) and row.get("loss") is not None]
        for row in rows:
            jsonfile.check(path, row, dict(dataset=str, role=str) | number, "")
    except UserError:
        return [], f"{path} is no table of eval.py"
    if sha256 not in found["weights_sha256"].values():
        return [], f"{path} is of other weights"
    return rows, "" if rows else f"{path} has no loss"


def table(rows):
    """The evaluation, in Markdown."""
    if not rows:
        return ["", "Its evaluation: not measured."]
    lines = ["", "| dataset | model | loss, nats per token | gap to control |", "|---|---|---|---|"]
    for row in rows:
        role = row["role"].replace("ln_free", "LN-free")
        gap = with_error(row, "gap", "+.4f")
        lines.append(f"| {row['dataset']} | {role} | {with_error(row, 'loss', '.4f')} | {gap} |")
    return lines


def with_error(row, key, form):
    """A number with its standard error, which a single window does not have."""
    if row.get(key) is None:
        return ""
    error = row.get(key + "_se")
    return f"{row[key]:{form}}" + ("" if error is None else f" ± {error:.4f}")
