"""
Model directories in the Hugging Face format: read and written. The model itself is defined in model.py.
"""
import json
import os
import pickle
import zipfile

import torch
from safetensors.torch import load_file, save

from model import config_from_hf
from parts.errors import UserError, on_disk, reading
from parts.fetch import fetch
from parts.files import read_json, whole_file

# transformers' other names for the same numbers of config.json, and for the tanh approximation of GELU
ALIASES = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
               max_position_embeddings="n_positions")
GELU_NEW = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", None)
# files of weights, the first that is there
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# --- reading


def read_model(cls, source, dropout):
    """The GPT, `cls`, of from_pretrained. UserError."""
    directory = fetch(source)
    hf = read_config(directory)
    known = [os.path.join(directory, name) for name in WEIGHTS]
    weights = [path for path in known if os.path.exists(path)][:1] or known[:1]
    if weights[0].endswith(".json"):  # an index of shards
        with reading(weights[0]):
            names = {os.path.basename(name) for name in read_json(weights[0])["weight_map"].values()}
        weights = [os.path.join(directory, name) for name in sorted(names)]
    for path in weights:
        if not os.path.isfile(path):
            raise UserError(f"{directory} is not a model directory: it has no {os.path.basename(path)}")
    with reading(directory):
        config = config_from_hf(hf, dropout)
        check_size(config, sum(os.path.getsize(path) for path in weights))
    model = cls(config)
    tensors = read_tensors(weights, model.hf_tensors())
    with reading(directory):
        model.load_hf(hf, tensors)
    return model


def check_size(config, nbytes):
    """ValueError if a model of this config has more parameters than its file has bytes: before memory is allocated."""
    C = config.n_embd
    parameters = 12 * config.n_layer * C * C + (config.vocab_size + config.block_size) * C
    if min(vars(config)[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")) < 1:
        raise ValueError(f"a size below 1 in {config}")
    if C % config.n_head:
        raise ValueError(f"n_embd {C} is not a multiple of n_head {config.n_head}")
    if parameters > nbytes:
        raise ValueError(f"its config describes {parameters:,} parameters, but the weights have {nbytes:,} bytes")


def read_config(directory):
    """A model directory's config.json, as a dict. UserError unless it is a GPT-2's that model.py can compute."""
    path = os.path.join(directory, "config.json")
    if not os.path.lexists(path):
        inside = os.path.join(directory, "model")
        hint = f"; a run's model is {inside}" if os.path.isdir(inside) else ""
        raise UserError(f"{directory} is not a model directory: it has no config.json{hint}")
    hf = read_json(path)
    kind = hf.get("model_type")
    if kind not in ("gpt2", "gpt2_ln_mode", "gpt2_folded"):
        raise UserError(f"{path}: model_type is {str(kind)[:40]!r}, but only GPT-2 models can be read")
    with reading(path):
        for alias, key in ALIASES.items():
            if alias in hf and hf.setdefault(key, hf[alias]) != hf[alias]:
                raise ValueError(f"{key} is {hf[key]!r}, but {alias} is {hf[alias]!r}")
        if kind == "gpt2":
            ours = dict(activation_function=GELU_NEW, add_cross_attention=(False, None),
                        n_inner=(4 * hf["n_embd"], None))
            for key, values in ours.items():
                if hf.get(key) not in values:
                    raise ValueError(f"{key} is {hf[key]!r}, but model.py has {values[0]!r}")
    return hf


def read_tensors(paths, expected):
    """{name: tensor} of the names and shapes of `expected`, such a dict too. UserError where the files have others."""
    tensors = {}
    for path in paths:
        with reading(path):
            found = load_file(path) if path.endswith(".safetensors") else load_torch(path)
            for name, tensor in found.items():  # GPT-2's first files leave `transformer.` out
                tensors["transformer." * name.startswith(("h.", "wte.", "wpe.", "ln_f.")) + name] = tensor
    with reading(path):
        head = tensors.pop("lm_head.weight", None) if "lm_head.weight" not in expected else None  # tied to wte
        if head is not None and not torch.equal(tensors.setdefault("transformer.wte.weight", head), head):
            raise ValueError("lm_head.weight is not wte.weight, but GPT-2's unembedding is tied to its embedding")
        for name, tensor in expected.items():
            found = tensors[name]  # else a KeyError with the name
            if found.shape != tensor.shape or not found.is_floating_point():
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, but config.json makes it floating "
                                 f"point {tuple(tensor.shape)}")
            if not found.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        masks = (".attn.bias", ".attn.masked_bias")  # old files hold causal masks as buffers
        strangers = [name for name in tensors if name not in expected and not name.endswith(masks)]
        if strangers:
            raise ValueError(f"the tensor {strangers[0][:80]} is not one of GPT-2's")
    return {name: tensors[name] for name in expected}


def load_torch(path):
    """What torch.save wrote, on the CPU; no code in it is run. An exception of any kind if it is damaged."""
    with open(path, "rb") as f:
        is_zip = f.read(4) == b"PK\3\4"  # since torch 1.6
    if is_zip:
        check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises how to run the code
        raise ValueError("it is damaged, or holds more than tensors and plain values") from None


def check_zip(path):
    """ValueError or BadZipFile if a part of what torch.save wrote is damaged: torch itself does not compare the
    CRC-32s. A compressed part could fill the memory."""
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type for part in archive.infolist()) or archive.testzip():
            raise ValueError("a part is damaged or compressed")


# --- writing


def write(directory, hf, tensors):
    """config.json and model.safetensors, each whole or not at all. UserError."""
    with on_disk(f"can't write {directory}"):
        os.makedirs(directory, exist_ok=True)
    weights = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    # config.json is the last to take its name: with it, the directory is a model
    with whole_file(os.path.join(directory, "config.json")) as config_file:
        with whole_file(os.path.join(directory, "model.safetensors")) as weights_file:
            weights_file.write(weights)
            config_file.write(json.dumps(hf, indent=2).encode())
