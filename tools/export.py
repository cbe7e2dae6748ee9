"""
An LN-free model in the forms that other tools open.

    python -m tools.export out/remove_ln --to=hf        # a plain GPT2LMHeadModel, which every loader takes
    python -m tools.export out/remove_ln --to=folded    # no LayerNorm at all: for GPT.from_pretrained and nnsight
    python -m tools.export out/remove_ln --to=hf --push=ORG/NAME

The plain form keeps its LayerNorm modules. Their layer_norm_epsilon is so large (1e12) that sqrt(var + eps) is a
constant, and their weights make up for it. The published LN-free models are stored in this way. It is safe in float32
and bfloat16. In a notebook, import to_bridge (TransformerLens 4) or to_hooked (2 and 3) from tools.export.
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
from parts.card import card, evaluation
from parts.files import unfinished
from parts.run import model_directory, weights_sha256
from parts.tokenizer import copy_tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
to = "hf"  # the form: hf or folded
out = ""  # the new directory; "": hf or folded in a run's out_dir, NAME_hf or NAME_folded here for other models
dtype = "float32"  # of the weights: float32, bfloat16 or float16, which needs a smaller --eps
eps = 1e12  # layer_norm_epsilon of the plain form; a smaller one lets the std vary a little again
push = ""  # ORG/NAME: upload the directory to this hub repository, after asking
# -----------------------------------------------------------------------------

FLOAT16_MAX = 65504
MAX_DIFFERENCE = 0.1  # between logits; beyond it, the export is a different model
GPT2_VOCABULARY = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken fetches it


# --- the forms


@torch.no_grad()
def plain_form(model, eps=1e12):
    """An LN-free GPT -> the same function with all sites real and layer_norm_epsilon eps, which save_pretrained writes
    as a plain GPT-2.

    For eps >> var, a fake site (x - mean) / std * weight + bias equals
    (x - mean) / sqrt(var + eps) * (weight * sqrt(eps) / std) + bias. GPT-2 has one ln_1 for query, key and value: it
    takes ln_1qk's std, and the value's rows of c_attn make up for ln_1v's. UserError if the model is folded or not
    LN-free. Source: the format of apollo-research/gpt2_noLN."""
    check_ln_free(model)
    if model.config.folded:
        raise UserError("the model is folded, and a plain GPT-2 has no place for its lm_head.bias: "
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
    """UserError with the reasons if it is not."""
    reasons = model.why_not_ln_free()
    if reasons:
        more = f" and {len(reasons) - 6} more reasons" if len(reasons) > 6 else ""
        raise UserError(f"not LN-free: {', '.join(reasons[:6])}{more}")


def folded_form(model):
    """An LN-free GPT, folded or not -> folded. UserError if it is not LN-free."""
    check_ln_free(model)
    return model if model.config.folded else model.fold().eval()


def to_bridge(model, **kwargs):
    """An LN-free, unfolded GPT -> TransformerLens 4's TransformerBridge of the plain form. kwargs go to
    boot_transformers, such as tokenizer=AutoTokenizer.from_pretrained(DIRECTORY); without one, only GPT-2's own
    tokenizer is known, and other models take token ids.

    It folds LN into the weights, as logit_attrs expects. Residual stream and logits stay the model's."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        plain_form(model).save_pretrained(folder)
        has_tokenizer = "tokenizer" in kwargs or write_tokenizer(model, folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
        bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, **kwargs)
    if not has_tokenizer:
        bridge.tokenizer = None  # the empty one that it made would turn any text into zeros
    unchanged = dict(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    bridge.enable_compatibility_mode(disable_warnings=True, **unchanged)
    return bridge


@torch.no_grad()
def to_hooked(model):
    """An LN-free GPT -> TransformerLens 2's or 3's HookedTransformer of the folded weights, with
    normalization_type=None."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model, c = folded_form(model), model.config
    hooked = HookedTransformer(HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_ctx=c.block_size, n_heads=c.n_head, d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type=None,
        default_prepend_bos=False, init_weights=False, device=str(model.lm_head.weight.device),
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
    names = [name for name in problems.missing_keys if not name.endswith((".mask", ".IGNORE"))]
    if names or problems.unexpected_keys:
        raise UserError(f"this release of TransformerLens has other weights: {names + problems.unexpected_keys}")
    return hooked.eval()


# --- files


@torch.no_grad()
def largest_difference(a, b):
    """The largest difference between the logits of two models on 64 random tokens. UserError if it is not finite."""
    T = min(64, a.config.block_size)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, a.config.vocab_size, (1, T)))
    difference = (a(ids)[0] - b(ids)[0]).abs().max().item()
    if not math.isfinite(difference):
        raise UserError("its logits are not finite: there is nothing to export")
    return difference


def check_float16(model):
    for name, p in model.named_parameters():
        largest = p.abs().max().item()
        if largest > FLOAT16_MAX:
            fits = (FLOAT16_MAX / largest) ** 2 * eps
            raise UserError(f"float16 ends at {FLOAT16_MAX}, but {name} reaches {largest:.2g}: use --dtype=bfloat16, "
                            f"or --eps={10 ** math.floor(math.log10(fits)):.0e}")


def write_tokenizer(model, folder, directory=""):
    """Write the tokenizer files that are beside the model in a directory, or GPT-2's for a model with GPT-2's
    vocabulary. False if there are none."""
    if directory and copy_tokenizer(directory, folder):
        return True
    if model.config.eot != 50256 or model.config.vocab_size < 50257:
        return False
    from tiktoken.load import read_file_cached

    make_tokenizer("gpt2")  # fetches the files once, and checks them
    for name, original in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(read_file_cached(GPT2_VOCABULARY + original))
    end = "<|endoftext|>"
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=model.config.block_size, bos_token=end,
                  eos_token=end, unk_token=end, add_prefix_space=False)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(config, f, indent=2)
    return True


def write(new, source, directory, folder, rows):
    """Write the export, whole or not at all. Returns whether it has a tokenizer."""
    half = unfinished(folder)
    shutil.rmtree(half, ignore_errors=True)  # from an export that was killed
    try:
        new.to(getattr(torch, dtype)).save_pretrained(half)
        with on_disk(f"can't write {folder}"):
            with open(os.path.join(half, "generation_config.json"), "w") as f:
                json.dump(dict(bos_token_id=new.config.eot, eos_token_id=new.config.eot), f)
            has_tokenizer = write_tokenizer(new, half, directory)
            with open(os.path.join(half, "README.md"), "w") as f:
                f.write(card(source, push or folder, to, eps, dtype, has_tokenizer, rows))
            os.rename(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return has_tokenizer


def upload(folder):
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        answer = input(f"upload {', '.join(sorted(os.listdir(folder)))} to {constants.ENDPOINT}/{push}? [y/N] ")
    except (EOFError, RuntimeError):  # stdin is closed
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        sys.exit(f"not uploaded; {folder} stays")
    try:
        hub.create_repo(push, exist_ok=True)
        hub.upload_folder(repo_id=push, folder_path=folder, commit_message="GPT-2 without LayerNorm")
    except Exception as e:  # of many kinds
        raise UserError(f"can't upload to {push}: {first_line(e)}; {folder} stays; "
                        f"log in with `hf auth login`, or run `hf upload {push} {folder}`") from None
    print(f"uploaded to {constants.ENDPOINT}/{push}")


def main():
    source = take_source("python -m tools.export OUT_DIR_OR_MODEL --to=hf, or --to=folded")
    choices = dict(to=("hf", "folded"), dtype=("float32", "bfloat16", "float16"))
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(eps=1), choices=choices)
    directory = model_directory(source)
    here = f"{os.path.basename(source.partition('@')[0])}_{to}"
    folder = out.rstrip("/") or (here if directory == source else os.path.join(source, to))
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: remove it, or choose another directory with --out")

    model = GPT.from_pretrained(directory).eval()
    new = plain_form(model, eps) if to == "hf" else folded_form(model)
    difference = largest_difference(new, model)
    if difference > MAX_DIFFERENCE:
        hint = f": with --eps={eps:g} the std still varies; use a larger one" if to == "hf" else ""
        raise UserError(f"its logits would be off by {difference:.2g}{hint}")
    if dtype == "float16":
        check_float16(new)
    rows, why_none = evaluation(source, weights_sha256(model))
    try:
        with interruptible():
            has_tokenizer = write(new, source, directory, folder, rows)
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
    print(f"its logits on random tokens, in float32, are within {difference:.1e} of {source}'s")
    if why_none:
        print(f"note: the card has no evaluation: {why_none}; eval.py --json={source}/eval.json makes one")
    if not has_tokenizer:
        print("note: no tokenizer files: there are none beside the model, and its vocabulary is not GPT-2's")
    if to == "hf" and dtype != "float16":
        print("note: it overflows in float16, unless you export with --dtype=float16 and a smaller --eps")
    if push:
        upload(folder)
    print(f"next: open it in other tools as {folder}/README.md shows")


if __name__ == "__main__":
    main()
