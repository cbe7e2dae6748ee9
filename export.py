"""
An LN-free model in the forms that other tools read.

    python export.py out/remove_ln --to=hf        # a plain GPT2LMHeadModel: transformers, TransformerLens 4, lm-evaluation-harness
    python export.py out/remove_ln --to=folded    # no LayerNorm in it at all: GPT.from_pretrained, nnsight
    python export.py out/remove_ln --to=hf --push=ORG/NAME

The plain form still has LayerNorm modules, whose layer_norm_epsilon is so large (1e12) that sqrt(var + eps) is a constant, which their
weights make up for; it is how the published LN-free models are stored, and safe in float32 and bfloat16. In a notebook, to_bridge and
to_hooked give TransformerLens's models, of release 4 and of releases 2 and 3.
"""
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace

import numpy as np
import tiktoken
import torch

from configurator import configure, one_line_errors
from model import GPT

# -----------------------------------------------------------------------------
to = "hf"  # hf or folded
out = ""  # the new directory; by default hf or folded below an out_dir, else NAME_hf or NAME_folded here
dtype = "float32"  # of the weights: float32, bfloat16, or float16 with a smaller --eps
eps = 1e12  # layer_norm_epsilon of the plain form, above 1; a smaller one lets sqrt(var + eps) vary a little with the token
push = ""  # ORG/NAME: upload the directory to this hub repository, after asking
# -----------------------------------------------------------------------------

FLOAT16_MAX = 65504
VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken's addresses, and what transformers calls the files

# of the model card
HF_USE = """
```python
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained("{name}")

from transformer_lens.model_bridge import TransformerBridge  # TransformerLens 4
bridge = TransformerBridge.boot_transformers("{name}")

from nnsight import LanguageModel
traced = LanguageModel("{name}")
```

Its LayerNorm modules have layer_norm_epsilon = {eps:g}, which makes sqrt(var + eps) a constant, and weights that make up for it.
{float16}
"""
FOLDED_USE = """
```python
from model import GPT  # of the repository that made it
model = GPT.from_pretrained("{name}")

from export import to_hooked  # TransformerLens 2 and 3
hooked = to_hooked(model)

from nnsight import NNsight
traced = NNsight(model)
```

There is no LayerNorm in it; the unembedding is its own matrix, with a bias.
"""


# --- the forms


@torch.no_grad()
def plain_form(model, eps=1e12):
    """An LN-free GPT -> the same function with all sites real and layer_norm_epsilon eps, which save_pretrained writes as a plain GPT-2.

    A fake site (x - mean) / std * weight + bias is (x - mean) / sqrt(var + eps) * (weight * sqrt(eps) / std) + bias for eps >> var.
    GPT-2 has one ln_1 for query, key and value: it takes ln_1qk's std, and the value's rows of c_attn make up for ln_1v's.
    ValueError if the model is not LN-free or is folded. Source: the format of apollo-research/gpt2_noLN."""
    check_ln_free(model)
    if model.config.folded:
        raise ValueError("the model is folded: the plain form of GPT-2 has no place for its lm_head.bias; export the unfolded model")
    new = GPT(replace(model.config, ln_eps=eps)).to(model.lm_head.weight).eval()
    new.load_state_dict(model.state_dict())
    C = model.config.n_embd
    for old, block in zip(model.transformer.h, new.transformer.h):
        for name in ("ln_1qk", "ln_2"):
            getattr(block, name).weight.mul_(math.sqrt(eps) / getattr(old, name).avg_std)
        ratio = old.ln_1qk.avg_std.double() / old.ln_1v.avg_std.double()
        W, b = old.attn.c_attn.weight[2 * C :].double(), old.ln_1v.bias
        block.attn.c_attn.weight[2 * C :] = W * ratio
        if b is not None:
            block.attn.c_attn.bias[2 * C :] += W @ b.double() * (1 - ratio)
    new.transformer.ln_f.weight.mul_(math.sqrt(eps) / model.transformer.ln_f.avg_std)
    return new


def check_ln_free(model):
    """ValueError that names the sites that are still real, or the treatment that is on."""
    real = [name for name, mode in model.ln_modes().items() if mode == "real"]
    if real:
        raise ValueError(f"not LN-free: still real are {', '.join(real[:6])}" + (f" and {len(real) - 6} more sites" if len(real) > 6 else ""))
    if not model.ln_free():
        raise ValueError("not LN-free: a treatment (bos or eot) is still on")


def folded_form(model):
    """An LN-free GPT, folded or not -> folded. ValueError if it is not LN-free."""
    check_ln_free(model)
    return model if model.config.folded else model.fold().eval()


def to_bridge(model, **kwargs):
    """An LN-free, unfolded GPT -> TransformerLens 4's TransformerBridge, from the plain form; kwargs go to boot_transformers."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        plain_form(model).save_pretrained(folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
        return TransformerBridge.boot_transformers(folder, hf_model=hf, **kwargs)


@torch.no_grad()
def to_hooked(model):
    """An LN-free GPT -> TransformerLens 2's or 3's HookedTransformer with normalization_type=None, from the folded weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model, c = folded_form(model), model.config
    hooked = HookedTransformer(HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.block_size, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type=None, default_prepend_bos=False, init_weights=False,
        device=str(model.lm_head.weight.device)))

    def heads(t):  # rows (C, ...) -> (heads, C / heads, ...)
        return t.unflatten(0, (c.n_head, -1))

    zeros, f = torch.zeros(c.n_embd), model.transformer
    state = {"embed.W_E": f.wte.weight, "pos_embed.W_pos": f.wpe.weight, "unembed.W_U": model.lm_head.weight.T, "unembed.b_U": model.lm_head.bias}
    for i, block in enumerate(f.h):
        at, attn, mlp = f"blocks.{i}.", block.attn, block.mlp
        for letter, W, b in zip("QKV", attn.c_attn.weight.chunk(3), attn.c_attn.bias.chunk(3)):
            state |= {f"{at}attn.W_{letter}": heads(W).mT, f"{at}attn.b_{letter}": heads(b)}
        state |= {at + "attn.W_O": heads(attn.c_proj.weight.T), at + "attn.b_O": zeros if attn.c_proj.bias is None else attn.c_proj.bias,
                  at + "mlp.W_in": mlp.c_fc.weight.T, at + "mlp.b_in": mlp.c_fc.bias,
                  at + "mlp.W_out": mlp.c_proj.weight.T, at + "mlp.b_out": zeros if mlp.c_proj.bias is None else mlp.c_proj.bias}
    problems = hooked.load_state_dict(state, strict=False)
    missing = [key for key in problems.missing_keys if not key.endswith((".mask", ".IGNORE"))]
    if missing or problems.unexpected_keys:
        raise ValueError(f"this release of TransformerLens names its weights otherwise: {missing + problems.unexpected_keys}")
    return hooked.eval()


# --- files


def open_source(source):
    """The model of an out_dir, a model directory or a hub repository, eval mode. ValueError: a run that has not finished."""
    if os.path.isdir(os.path.join(source, "model")):
        return GPT.from_pretrained(os.path.join(source, "model")).eval()
    path = os.path.join(source, "ckpt.pt")
    if os.path.exists(path):
        try:
            sites = torch.load(path, map_location="cpu", weights_only=True)["ln_state"]["sites"]
        except Exception as e:  # torch.load raises many kinds
            raise ValueError(f"{source} is not finished, and {path} is not a whole checkpoint ({type(e).__name__})") from None
        real = [name for name, site in sites.items() if site["mode"] == "real"]
        problem = f"still real are {', '.join(real)}" if real else "it has no model/"
        raise ValueError(f"{source} is not finished: {problem}; go on with --init_from=resume")
    return GPT.from_pretrained(source).eval()


@torch.no_grad()
def largest_difference(a, b):
    """Of the logits of two models, over 64 random tokens. ValueError if it is not finite."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, a.config.vocab_size, (1, min(64, a.config.block_size))))
    apart = (a(ids)[0] - b(ids)[0]).abs().max().item()
    if not math.isfinite(apart):
        raise ValueError("its logits are not finite numbers: nothing to export")
    return apart


def check_float16(model):
    for name, p in model.named_parameters():
        largest = p.abs().max().item()
        if largest > FLOAT16_MAX:
            fits = (FLOAT16_MAX / largest) ** 2 * eps
            raise ValueError(f"float16 ends at {FLOAT16_MAX}, and {name} reaches {largest:.2g}: use --dtype=bfloat16, "
                             f"or --eps={10 ** math.floor(math.log10(fits)):.0e}")


def write_tokenizer(model, folder):
    """GPT-2's tokenizer files, where that is the model's tokenizer; True if so."""
    if model.config.eot != 50256 or model.config.vocab_size < 50257:
        return False
    from tiktoken.load import read_file_cached

    tiktoken.get_encoding("gpt2")  # fetches them once, and checks them
    for name, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(read_file_cached(VOCABULARY + theirs))
    end = "<|endoftext|>"
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=model.config.block_size, bos_token=end, eos_token=end, unk_token=end)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config | dict(add_prefix_space=False), f, indent=2)
    return True


def write_card(source, folder, name):
    """README.md: what it is, its evaluation and settings where the run left them, and how to load it."""
    lines = ["---", "library_name: transformers" if to == "hf" else "tags: [interpretability]", "---", "# GPT-2 without LayerNorm", "",
             f"Made from `{source}`: every LayerNorm divides by a constant, so that the residual stream is read affinely (arXiv 2409.13710)."]
    try:
        with open(os.path.join(source, "eval.json")) as f:
            rows = [row for row in json.load(f)["rows"] if row.get("loss") is not None]
        lines += ["", "| dataset | model | loss, nats per token | gap to control |", "|---|---|---|---|"] * bool(rows)
        for row in rows:
            gap = f"{row['gap']:+.4f} ± {row['gap_se']:.4f}" if row["gap"] is not None else ""
            lines.append(f"| {row['dataset']} | {row['role'].replace('ln_free', 'LN-free')} | {row['loss']:.4f} ± {row['loss_se']:.4f} | {gap} |")
    except (OSError, ValueError, KeyError):
        lines += ["", "Its evaluation: not measured."]
    float16 = "float16 works too." if dtype == "float16" else "float16 overflows: use float32 or bfloat16."
    lines.append((HF_USE if to == "hf" else FOLDED_USE).format(name=name, eps=eps, float16=float16))
    if os.path.exists(os.path.join(source, "settings.json")):
        with open(os.path.join(source, "settings.json")) as f:
            lines += ["Settings of the run:", "", "```python", *(f"{key} = {value!r}" for key, value in json.load(f).items()), "```"]
    with open(os.path.join(folder, "README.md"), "w") as f:
        f.write("\n".join(lines) + "\n")


def upload(folder):
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    try:
        answer = input(f"upload {', '.join(sorted(os.listdir(folder)))} to {constants.ENDPOINT}/{push}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        sys.exit(f"not uploaded; {folder} stays")
    try:
        hub.create_repo(push, exist_ok=True)
        hub.upload_folder(repo_id=push, folder_path=folder, commit_message="GPT-2 without LayerNorm")
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled) as e:
        raise OSError(f"can't upload to {push}: {str(e).splitlines()[0]}; {folder} stays; log in with `hf auth login`, "
                      f"or upload it with `hf upload {push} {folder}`") from None
    print(f"uploaded to {constants.ENDPOINT}/{push}")


def main():
    if len(sys.argv) < 2 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("--help", "-h")):
        sys.exit("error: usage: python export.py OUT_DIR_OR_MODEL --to=hf, or --to=folded")
    help_only = sys.argv[1] in ("--help", "-h")
    configure(globals(), sys.argv[1 if help_only else 2 :], __doc__)
    source = sys.argv[1].rstrip("/")
    if to not in ("hf", "folded"):
        sys.exit(f"error: --to is {to!r}, but it must be hf or folded")
    if dtype not in ("float32", "bfloat16", "float16"):
        sys.exit(f"error: dtype is {dtype!r}, but it must be float32, bfloat16 or float16")
    if eps <= 1:
        sys.exit(f"error: --eps={eps} must be above 1: with less, the export divides by each token's std again")
    run = os.path.isdir(os.path.join(source, "model"))
    folder = out or (os.path.join(source, to) if run else os.path.basename(source.partition("@")[0]) + "_" + to)
    with one_line_errors():
        if os.path.exists(folder):
            raise ValueError(f"{folder} exists: remove it, or name another directory with --out")
        model = open_source(source)
        new = plain_form(model, eps) if to == "hf" else folded_form(model)
        apart = largest_difference(new, model)
        if dtype == "float16":
            check_float16(new)
        half = folder + ".tmp"
        if os.path.lexists(half):
            raise ValueError(f"{half} is in the way: remove it, or name another directory with --out")
        try:
            new.to(getattr(torch, dtype)).save_pretrained(half)
            with open(os.path.join(half, "generation_config.json"), "w") as f:
                json.dump(dict(bos_token_id=model.config.eot, eos_token_id=model.config.eot), f)
            tokenizer = write_tokenizer(model, half)
            write_card(source, half, push or os.path.abspath(folder))
            os.rename(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
        print(f"its logits of random tokens, in float32, are within {apart:.1e} of {source}'s")
        if not tokenizer:
            print(f"note: no tokenizer files: end-of-text {model.config.eot} is not GPT-2's")
        if to == "hf" and dtype != "float16":
            print("note: for float32 and bfloat16; in float16 it overflows (--dtype=float16 with a smaller --eps)")
        if push:
            upload(folder)


if __name__ == "__main__":
    main()
