"""
Model directories in the Hugging Face format: found here or on a hub, read, checked and written.
What a model is, is model.py's.
"""
import json
import os
import re
import zipfile
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from parts import jsonfile
from parts.errors import UserError, first_line, on_disk, waiting_for
from parts.files import whole_file

LARGEST_STD = 1e30  # beyond any residual stream's, and within float32


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
        with waiting_for(constants.ENDPOINT):
            return download(huggingface_hub.hf_hub_download, repo, revision or None)
    except UserError:
        raise
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
    except Exception as e:  # of the library's transport, and what it makes of nonsense
        problem = f"does not answer as a hub does ({first_line(e)}): try again"
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
    advice = "it is not an index of shards"
    names = jsonfile.read(index, {"weight_map": dict}, advice)["weight_map"].values()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index} names the shard {str(name)[:40]!r}, no file beside it: {advice}")
    return sorted(set(names))


def read_config(directory):
    """config.json, as a dict that model.config_from_hf takes. UserError if it is none, or of
    something else than a GPT-2."""
    path = os.path.join(directory, "config.json")
    advice = "only GPT-2 models can be read"
    if not os.path.lexists(path):
        inside = os.path.join(directory, "model")
        hint = f"; a run's model is {inside}" if os.path.isdir(inside) else ""
        raise UserError(f"{directory} is not a model directory: it has no config.json{hint}")
    hf = jsonfile.read(path, {"model_type?": str}, advice)
    kind = hf.get("model_type")
    if kind not in ("gpt2", "gpt2_ln_mode", "gpt2_folded"):
        raise UserError(f"{path}: model_type is {str(kind)[:40]!r}, but {advice}")
    sizes = dict.fromkeys(("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"), (1, 2**31 - 1))
    jsonfile.check(path, hf, sizes, advice)
    if hf["n_embd"] % hf["n_head"]:
        raise UserError(f"{path}: n_embd {hf['n_embd']} is not a multiple of n_head {hf['n_head']}")
    jsonfile.check(path, hf, {"layer_norm_epsilon?": float}, "GPT-2's is 1e-5")
    if (hf.get("layer_norm_epsilon") or 0) < 0:
        raise UserError(f"{path}: layer_norm_epsilon is {hf['layer_norm_epsilon']}, below 0")
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


def check_ln_state(path, state, sites):
    """UserError unless what a file says of LayerNorm modes has each of these sites' mode and constants, and whether
    both treatments are on."""
    if not isinstance(state, dict) or not isinstance(state.get("sites"), dict):
        raise UserError(f"{path}: ln_state is not whole: it has no sites")
    for name in sites:
        site = state["sites"].get(name)
        if not isinstance(site, dict) or site.get("mode") not in ("real", "fake"):
            raise UserError(f"{path}: ln_state is not whole: {name} has no mode, real or fake")
        for key in ("avg_std", "bos_std"):
            constant = site.get(key)
            if not jsonfile.fits(constant, float) or not 0 < constant < LARGEST_STD:
                raise UserError(f"{path}: ln_state is not whole: {name} has the {key} {str(constant)[:40]}")
    for treatment in ("bos", "eot"):
        if not isinstance(state.get(treatment), bool):
            raise UserError(f"{path}: ln_state is not whole: it does not say whether {treatment} is on")


def check_sizes(directory, hf):
    """UserError unless the weights of a directory have the sizes that its config.json gives: before a model of these
    sizes is made."""
    shapes, bytes_there = {}, 0
    for path in weight_files(directory):
        bytes_there += os.path.getsize(path)
        if path.endswith(".safetensors"):
            with refusing_safetensors(path), safe_open(path, "pt") as f:
                shapes |= {name.removeprefix("transformer."): f.get_slice(name).get_shape() for name in f.keys()}
    C, layers = hf["n_embd"], hf["n_layer"]
    parameters = layers * 12 * C * C + (hf["vocab_size"] + hf["n_positions"]) * C
    if parameters > bytes_there:
        raise UserError(f"{directory}: config.json describes {parameters:,} parameters, and the weights have just "
                        f"{bytes_there:,} bytes")
    if shapes and len({name.split(".")[1] for name in shapes if name.startswith("h.")}) < layers:
        raise UserError(f"{directory}: config.json has {layers} layers, and the weights fewer")


def weight_files(directory):
    """The paths of a directory's weights: model.safetensors, its shards, or pytorch_model.bin, the first that is
    there."""
    path = os.path.join(directory, "model.safetensors")
    index = path + ".index.json"
    pickled = os.path.join(directory, "pytorch_model.bin")
    if os.path.exists(path):
        found = [path]
    elif os.path.exists(index):
        found = [os.path.join(directory, name) for name in shards(index)]
    elif os.path.exists(pickled):
        found = [pickled]
    else:
        raise UserError(f"{directory} is not a model directory: it has no model.safetensors")
    for path in found:
        if not os.path.isfile(path):
            raise UserError(f"{directory} is not a model directory: it has no {os.path.basename(path)}")
    return found


def read_tensors(directory, expected):
    """{name: tensor} of just the names and shapes of `expected`, another such dict. UserError where
    the files have others."""
    tensors = {}
    for path in weight_files(directory):
        for name, tensor in (load_safetensors if path.endswith(".safetensors") else load_pickled)(path).items():
            # GPT-2's first files say `h.0...` where later ones say `transformer.h.0...`
            tensors["transformer." + name if name.startswith(("h.", "wte.", "wpe.", "ln_f.")) else name] = tensor
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: the tensor {name} is missing")
        if tensors[name].shape != tensor.shape:
            shapes = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{path}: {name} has shape {shapes[0]}, but config.json makes it {shapes[1]}")
        if not tensors[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[name].dtype}, not floating-point numbers")
    for name in tensors.keys() - expected.keys():
        # causal masks, which old files hold as buffers, and the unembedding, which is wte
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
            raise UserError(f"{path}: the tensor {name[:80]} is not one of GPT-2's")
    return {name: tensors[name] for name in expected}


def load_safetensors(path):
    with refusing_safetensors(path):
        return load_file(path)


@contextmanager
def refusing_safetensors(path):
    try:
        yield
    except (SafetensorError, OSError, ValueError, OverflowError) as e:
        raise UserError(f"{path} can't be read, cut short or not safetensors: {str(e).splitlines()[0][:200]}") from None


def load_pickled(path):
    """{name: tensor} of a pytorch_model.bin; no code in it is run. UserError."""
    tensors = load_torch(path)
    if not isinstance(tensors, dict) or not all(isinstance(n, str) for n in tensors):
        raise UserError(f"{path} can't be read: it is not a dict of tensors by their names")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{path} can't be read: {name[:80]} is not a plain tensor")
    return tensors


def load_torch(path):
    """What torch.save wrote, on the CPU, all of it as it was written; no code in it is run. UserError."""
    try:
        check_parts(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as e:  # torch.load raises many kinds
        raise UserError(f"{path} can't be read, cut short, damaged or not plain tensors ({type(e).__name__})") from None


def check_parts(path):
    """ValueError unless each part of what torch.save wrote, a zip file, has the CRC-32 it was written with. Its parts
    are never packed: one that is could fill the memory."""
    with open(path, "rb") as f:
        if f.read(4) != b"PK\3\4":
            return  # before torch 1.6
    with zipfile.ZipFile(path) as archive:
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed or archive.testzip():
            raise ValueError(f"{path}: a part is damaged or packed")


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
