"""
Model directories in the Hugging Face format: found here or on a hub, read, checked and written.
What a model is, is model.py's.
"""
import json
import math
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from parts.errors import UserError, on_disk
from parts.files import whole_file


def fetch(source):
    """A local directory with config.json and weights: source itself, or else the hub repository
    NAME, ORG/NAME or either with @REVISION, from huggingface_hub's cache (HF_HOME, HF_ENDPOINT,
    HF_TOKEN and HF_HUB_OFFLINE work). UserError."""
    if os.path.isdir(source):
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or os.path.isdir(source.split("/")[0]):
        raise UserError(f"there is no directory {source}")
    import huggingface_hub  # comes with datasets; a local directory does without
    from huggingface_hub import constants, errors

    repo, _, revision = source.partition("@")
    try:
        return download(huggingface_hub.hf_hub_download, repo, revision or None)
    except errors.HFValidationError:
        problem = "has no repositories of such names"
    except errors.GatedRepoError:
        problem = "wants you to accept its terms there and to log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        problem = "has no such repository; for a private one, set HF_TOKEN or run `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"has {repo}, but no revision {revision}"
    except errors.LocalEntryNotFoundError as e:
        cause = str(e.__cause__ or "offline").splitlines()[0]
        problem = (f"can't be asked ({cause}), nor is it in the cache {constants.HF_HUB_CACHE}: "
                   "download it elsewhere and name its directory")
    except errors.EntryNotFoundError as e:
        problem = f"has it, but not the file {os.path.basename(str(e.response.url))}"
    except errors.HfHubHTTPError as e:
        problem = f"answered: {str(e).splitlines()[0]}"
        if e.response.status_code == 401:
            problem += ": set HF_TOKEN or run `hf auth login`"
    except FileNotFoundError:
        problem = "has it, but without model.safetensors or pytorch_model.bin"
    except OSError as e:  # a full disk
        raise UserError(f"{source} can't be fetched: {e}") from None
    raise UserError(f"{source} is not a directory here, and {constants.ENDPOINT} {problem}")


def download(get, repo, revision):
    """The cache's directory with config.json and the weights, all of one commit. FileNotFoundError
    if there are no weights."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    directory = os.path.dirname(get(repo, "config.json", revision=revision))
    commit = os.path.basename(directory)
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        try:
            path = get(repo, name, revision=commit)
        except RemoteEntryNotFoundError:
            continue
        if name.endswith(".index.json"):
            for shard in shards(path):
                get(repo, shard, revision=commit)
        return directory
    raise FileNotFoundError


def shards(index):
    """The file names in a model.safetensors.index.json."""
    try:
        with open(index) as f:
            return sorted(set(json.load(f)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, ValueError):
        raise UserError(f"{index} is not an index of shards") from None


def read_config(directory):
    """config.json, as a dict that model.config_from_hf takes. UserError if it is none, or of
    something else than a GPT-2."""
    path = os.path.join(directory, "config.json")
    try:
        with open(path) as f:
            hf = json.load(f)
    except FileNotFoundError:
        inside = os.path.join(directory, "model")
        hint = f"; a run's model is {inside}" if os.path.isdir(inside) else ""
        raise UserError(f"{directory} is not a model directory: it has no config.json{hint}") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    except OSError as e:
        raise UserError(f"can't read {path}: {e.strerror}") from None
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if kind not in ("gpt2", "gpt2_ln_mode", "gpt2_folded"):
        raise UserError(f"{path}: model_type is {kind!r}, but only GPT-2 models can be read")
    for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"):
        if type(hf.get(key)) is not int or hf[key] < 1:
            raise UserError(f"{path}: {key} is missing or not a positive integer")
    if hf["n_embd"] % hf["n_head"]:
        raise UserError(f"{path}: n_embd {hf['n_embd']} is not a multiple of n_head {hf['n_head']}")
    eps = hf.get("layer_norm_epsilon", 1e-5)
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise UserError(f"{path}: layer_norm_epsilon is {eps!r}, not a number from 0 on")
    if kind == "gpt2":
        check_plain(path, hf)
    return hf


def check_plain(path, hf):
    """UserError if transformers is told to compute something else than model.py does."""
    ours = dict(
        activation_function="gelu_new",
        n_inner=4 * hf["n_embd"],
        scale_attn_weights=True,
        tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    for key, value in ours.items():
        if hf.get(key) not in (None, value):
            raise UserError(f"{path}: {key} is {hf[key]!r}, but model.py has {value!r}")


def check_ln_state(directory, hf, sites):
    """UserError unless a config.json of LayerNorm modes says of each of these sites its mode and
    constants, and of both treatments whether they are on."""
    if hf["model_type"] != "gpt2_ln_mode":
        return
    path = os.path.join(directory, "config.json")
    state = hf.get("ln_state")
    if not isinstance(state, dict) or not isinstance(state.get("sites"), dict):
        raise UserError(f"{path}: ln_state is not whole: it has no sites")
    for name in sites:
        site = state["sites"].get(name)
        if not isinstance(site, dict) or site.get("mode") not in ("real", "fake"):
            raise UserError(f"{path}: ln_state is not whole: {name} has no mode, real or fake")
        for key in ("avg_std", "bos_std"):
            constant = site.get(key)
            if not isinstance(constant, (int, float)) or not 0 < constant < math.inf:
                raise UserError(f"{path}: ln_state is not whole: {name} has the {key} {constant!r}")
    for treatment in ("bos", "eot"):
        if not isinstance(state.get(treatment), bool):
            raise UserError(f"{path}: ln_state is not whole: it does not say whether {treatment} is on")


def read_tensors(directory, expected):
    """{name: tensor} of just the names and shapes of `expected`, another such dict. UserError where
    the file has others."""
    path, found = load_tensors(directory)
    tensors = {}
    for name, tensor in found.items():
        # GPT-2's first files say `h.0...` where later ones say `transformer.h.0...`
        tensors["transformer." + name if name.startswith(("h.", "wte.", "wpe.", "ln_f.")) else name] = tensor
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: the tensor {name} is missing")
        if tensors[name].shape != tensor.shape:
            shapes = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{path}: {name} has shape {shapes[0]}, but config.json makes it {shapes[1]}")
    for name in tensors.keys() - expected.keys():
        # causal masks, which old files hold as buffers, and the unembedding, which is wte
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
            raise UserError(f"{path}: the tensor {name} is not one of GPT-2's")
    return {name: tensors[name] for name in expected}


def load_tensors(directory):
    """(path, {name: tensor}) from model.safetensors, its shards or pytorch_model.bin, the first
    that is there."""
    path = os.path.join(directory, "model.safetensors")
    index = path + ".index.json"
    pickled = os.path.join(directory, "pytorch_model.bin")
    if os.path.exists(path):
        return path, load_safetensors(path)
    if os.path.exists(index):
        tensors = {}
        for name in shards(index):
            tensors |= load_safetensors(os.path.join(directory, name))
        return index, tensors
    if os.path.exists(pickled):
        try:
            return pickled, torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as e:  # torch.load raises many kinds
            raise UserError(f"{pickled} can't be read, cut short or not plain tensors ({type(e).__name__})") from None
    raise UserError(f"{directory} is not a model directory: it has no model.safetensors")


def load_safetensors(path):
    try:
        return load_file(path)
    except FileNotFoundError:
        folder, name = os.path.split(path)
        raise UserError(f"{folder} is not a model directory: it has no {name}") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} can't be read, cut short or not safetensors: {e}") from None


def write(directory, hf, tensors):
    """config.json and model.safetensors, each whole or not at all."""
    with on_disk(f"can't write {directory}"):
        os.makedirs(directory, exist_ok=True)
    weights = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    # config.json is the last to take its name: with it, the directory is a model
    with whole_file(os.path.join(directory, "config.json")) as config_file:
        with whole_file(os.path.join(directory, "model.safetensors")) as weights_file:
            weights_file.write(weights)
            config_file.write(json.dumps(hf, indent=2).encode())
