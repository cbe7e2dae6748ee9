"""
An LN-free model in the forms that other tools read.

    python -m tools.export out/remove_ln --to=hf        # a plain GPT2LMHeadModel, which every loader takes
    python -m tools.export out/remove_ln --to=folded    # no LayerNorm in it at all: GPT.from_pretrained, nnsight
    python -m tools.export out/remove_ln --to=hf --push=ORG/NAME

The plain form still has LayerNorm modules, whose layer_norm_epsilon is so large (1e12) that
sqrt(var + eps) is a constant, which their weights make up for; it is how the published LN-free
models are stored, and safe in float32 and bfloat16. In a notebook, to_bridge and to_hooked give
TransformerLens's models, of release 4 and of releases 2 and 3.
"""
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace

from parts.errors import UserError, begin_script, first_line, interruptible, on_disk

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch

from configurator import configure, take_source
from model import GPT
from parts.card import card, evaluation, how_to_open
from parts.run import model_directory, weights_sha256
from parts.tokenizer import copy_tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
to = "hf"  # hf or folded: the form
out = ""  # the new directory; "": hf or folded below an out_dir, else NAME_hf or NAME_folded here
dtype = "float32"  # float32, bfloat16 or float16: of the weights; float16 needs a smaller --eps
eps = 1e12  # layer_norm_epsilon of the plain form, above 1; with a smaller one the std varies a little again
push = ""  # ORG/NAME: upload the directory to this hub repository, after asking
# -----------------------------------------------------------------------------

FLOAT16_MAX = 65504
MOST_APART = 0.1  # of a logit, from which an export is another model
VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken has it from


# --- the forms


@torch.no_grad()
def plain_form(model, eps=1e12):
    """An LN-free GPT -> the same function with all sites real and layer_norm_epsilon eps, which
    save_pretrained writes as a plain GPT-2.

    A fake site (x - mean) / std * weight + bias is (x - mean) / sqrt(var + eps) * (weight *
    sqrt(eps) / std) + bias for eps >> var. GPT-2 has one ln_1 for query, key and value: it takes
    ln_1qk's std, and the value's rows of c_attn make up for ln_1v's. UserError if the model is not
    LN-free or is folded. Source: the format of apollo-research/gpt2_noLN."""
    check_ln_free(model)
    if model.config.folded:
        raise UserError("the model is folded: the plain form of GPT-2 has no place for its lm_head.bias; "
                        "export the unfolded model")
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
    """UserError that says why, if it is not."""
    reasons = model.why_not_ln_free()
    if reasons:
        more = f" and {len(reasons) - 6} more reasons" if len(reasons) > 6 else ""
        raise UserError(f"not LN-free: {', '.join(reasons[:6])}{more}")


def folded_form(model):
    """An LN-free GPT, folded or not -> folded. UserError if it is not LN-free."""
    check_ln_free(model)
    return model if model.config.folded else model.fold().eval()


def to_bridge(model, **kwargs):
    """An LN-free, unfolded GPT -> TransformerLens 4's TransformerBridge, from the plain form; kwargs go
    to boot_transformers, as tokenizer=AutoTokenizer.from_pretrained(DIRECTORY). Without that, and with
    another tokenizer than GPT-2's, it takes token ids alone.

    Its LNs are folded into the weights, as logit_attrs expects, and nothing else is changed: the
    residual stream and the logits are the model's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        plain_form(model).save_pretrained(folder)
        has_tokenizer = "tokenizer" in kwargs or write_tokenizer(model, folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
        bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, **kwargs)
    if not has_tokenizer:
        bridge.tokenizer = None  # the empty one that was made for it would turn any text into zeros
    bridge.enable_compatibility_mode(
        disable_warnings=True,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return bridge


@torch.no_grad()
def to_hooked(model):
    """An LN-free GPT -> TransformerLens 2's or 3's HookedTransformer with normalization_type=None,
    from the folded weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model, c = folded_form(model), model.config
    hooked = HookedTransformer(HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.block_size,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size,
        act_fn="gelu_new",
        normalization_type=None,
        default_prepend_bos=False,
        init_weights=False,
        device=str(model.lm_head.weight.device),
    ))

    def heads(t):  # rows (C, ...) -> (heads, C / heads, ...)
        return t.unflatten(0, (c.n_head, -1))

    def bias(linear):
        return torch.zeros(c.n_embd) if linear.bias is None else linear.bias

    state = {
        "embed.W_E": model.transformer.wte.weight,
        "pos_embed.W_pos": model.transformer.wpe.weight,
        "unembed.W_U": model.lm_head.weight.T,
        "unembed.b_U": model.lm_head.bias,
    }
    for i, block in enumerate(model.transformer.h):
        attn, mlp = block.attn, block.mlp
        for letter, W, b in zip("QKV", attn.c_attn.weight.chunk(3), attn.c_attn.bias.chunk(3)):
            state[f"blocks.{i}.attn.W_{letter}"] = heads(W).mT
            state[f"blocks.{i}.attn.b_{letter}"] = heads(b)
        state[f"blocks.{i}.attn.W_O"] = heads(attn.c_proj.weight.T)
        state[f"blocks.{i}.attn.b_O"] = bias(attn.c_proj)
        state[f"blocks.{i}.mlp.W_in"] = mlp.c_fc.weight.T
        state[f"blocks.{i}.mlp.b_in"] = mlp.c_fc.bias
        state[f"blocks.{i}.mlp.W_out"] = mlp.c_proj.weight.T
        state[f"blocks.{i}.mlp.b_out"] = bias(mlp.c_proj)
    problems = hooked.load_state_dict(state, strict=False)
    missing = [key for key in problems.missing_keys if not key.endswith((".mask", ".IGNORE"))]
    if missing or problems.unexpected_keys:
        names = missing + problems.unexpected_keys
        raise UserError(f"this release of TransformerLens names its weights otherwise: {names}")
    return hooked.eval()


# --- files


@torch.no_grad()
def largest_difference(a, b):
    """Of the logits of two models, over 64 random tokens. UserError if it is not finite."""
    T = min(64, a.config.block_size)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, a.config.vocab_size, (1, T)))
    apart = (a(ids)[0] - b(ids)[0]).abs().max().item()
    if not math.isfinite(apart):
        raise UserError("its logits are not finite numbers: nothing to export")
    return apart


def check_float16(model):
    for name, p in model.named_parameters():
        largest = p.abs().max().item()
        if largest > FLOAT16_MAX:
            fits = (FLOAT16_MAX / largest) ** 2 * eps
            raise UserError(f"float16 ends at {FLOAT16_MAX}, and {name} reaches {largest:.2g}: use --dtype=bfloat16, "
                            f"or --eps={10 ** math.floor(math.log10(fits)):.0e}")


def write_tokenizer(model, folder, directory=""):
    """The tokenizer files that stand beside the model in a directory, or GPT-2's where that is its
    tokenizer; False if there are none."""
    if directory and copy_tokenizer(directory, folder):
        return True
    if model.config.eot != 50256 or model.config.vocab_size < 50257:
        return False
    from tiktoken.load import read_file_cached

    make_tokenizer("gpt2")  # fetches them once, and checks them
    for name, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(read_file_cached(VOCABULARY + theirs))
    end = "<|endoftext|>"
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=model.config.block_size)
    config |= dict(bos_token=end, eos_token=end, unk_token=end)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config | dict(add_prefix_space=False), f, indent=2)
    return True


def write(model, new, source, directory, folder, rows):
    """The new directory, whole or not at all; whether it has a tokenizer."""
    half = folder + ".tmp"
    if os.path.lexists(half):
        raise UserError(f"{half} is in the way: remove it, or name another directory with --out")
    try:
        new.to(getattr(torch, dtype)).save_pretrained(half)
        with on_disk(f"can't write {folder}"):
            with open(os.path.join(half, "generation_config.json"), "w") as f:
                json.dump(dict(bos_token_id=model.config.eot, eos_token_id=model.config.eot), f)
            has_tokenizer = write_tokenizer(model, half, directory)
            name = push or os.path.abspath(folder)
            with open(os.path.join(half, "README.md"), "w") as f:
                f.write(card(source, name, to, how_to_open(name, to, has_tokenizer, eps, dtype), rows))
            os.rename(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)  # this call made it
    return has_tokenizer


def upload(folder):
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        answer = input(f"upload {', '.join(sorted(os.listdir(folder)))} to {constants.ENDPOINT}/{push}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        sys.exit(f"not uploaded; {folder} stays")
    try:
        hub.create_repo(push, exist_ok=True)
        hub.upload_folder(repo_id=push, folder_path=folder, commit_message="GPT-2 without LayerNorm")
    except Exception as e:  # of many kinds
        raise UserError(f"can't upload to {push}: {first_line(e)}; {folder} stays; "
                        f"log in with `hf auth login`, or upload it with `hf upload {push} {folder}`") from None
    print(f"uploaded to {constants.ENDPOINT}/{push}")


def main():
    source = take_source("python -m tools.export OUT_DIR_OR_MODEL --to=hf, or --to=folded")
    configure(globals(), sys.argv[1:], __doc__)
    if eps <= 1:
        raise UserError(f"--eps={eps} must be above 1: with less, the export divides by each token's std again")
    directory = model_directory(source)
    folder = out
    if not folder and directory != source:  # a run's out_dir
        folder = os.path.join(source, to)
    elif not folder:
        folder = os.path.basename(source.partition("@")[0]) + "_" + to
    if os.path.exists(folder):
        raise UserError(f"{folder} exists: remove it, or name another directory with --out")

    model = GPT.from_pretrained(directory).eval()
    new = plain_form(model, eps) if to == "hf" else folded_form(model)
    apart = largest_difference(new, model)
    if apart > MOST_APART:
        hint = f": with --eps={eps:g} the std still varies; use a larger one" if to == "hf" else ""
        raise UserError(f"its logits would be off by {apart:.2g}{hint}")
    if dtype == "float16":
        check_float16(new)
    rows, why_none = evaluation(source, weights_sha256(model))
    try:
        with interruptible():
            has_tokenizer = write(model, new, source, directory, folder, rows)
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
    if why_none:
        print(f"note: the card has no evaluation: {why_none}; eval.py --json={source}/eval.json makes one")
    print(f"its logits of random tokens, in float32, are within {apart:.1e} of {source}'s")
    if not has_tokenizer:
        print(f"note: no tokenizer files: end-of-text {model.config.eot} is not GPT-2's, "
              "and no tokenizer.json stands beside the model")
    if to == "hf" and dtype != "float16":
        print("note: for float32 and bfloat16; in float16 it overflows (--dtype=float16 with a smaller --eps)")
    if push:
        upload(folder)
    print(f"next: {folder}/README.md has the lines that open it in other tools")


if __name__ == "__main__":
    main()
