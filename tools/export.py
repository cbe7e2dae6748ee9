"""
An LN-free model in the forms that other tools read.

    python -m tools.export out/remove_ln --to=hf        # a plain GPT2LMHeadModel: every loader takes it
    python -m tools.export out/remove_ln --to=folded    # without any LayerNorm: for GPT.from_pretrained, nnsight
    python -m tools.export out/remove_ln --to=hf --push=ORG/NAME

The plain form keeps LayerNorm modules, as the published LN-free models do: with layer_norm_epsilon 1e12,
sqrt(var + eps) is a constant, and the LayerNorm weights make up for it. Use it in float32 or bfloat16. In a notebook,
to_bridge and to_hooked return TransformerLens's models, for releases 4 and 2 to 3.
"""
import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace

from parts.errors import UserError, asking_hub, begin_script, on_disk, say_next

if __name__ == "__main__":
    begin_script()  # before the slow imports

import huggingface_hub as hub
import numpy as np
import torch

from configurator import configure, take_source
from model import GPT
from parts.card import card, evaluation
from parts.files import unfinished, write_json
from parts.run import model_directory, weights_sha256
from parts.tokenizer import copy_tokenizer, make_tokenizer

# -----------------------------------------------------------------------------
to = "hf"  # the form: hf or folded
out = ""  # the new directory; "": hf or folded in a run's out_dir, else NAME_hf or NAME_folded here
dtype = "float32"  # dtype of the weights: float32 or bfloat16; the plain form overflows in float16
push = ""  # ORG/NAME: upload the directory to this hub repository, after asking
# -----------------------------------------------------------------------------

EPS = 1e12  # layer_norm_epsilon of the plain form, as apollo-research/gpt2_noLN has it


# --- the forms


@torch.no_grad()
def plain_form(model):
    """An LN-free GPT -> the same function with all sites real and layer_norm_epsilon EPS: save_pretrained writes it
    as a plain GPT-2. UserError if the model is not LN-free, or is folded.

    A fake site (x - mean) / std * weight + bias is, for eps >> var, the real site
    (x - mean) / sqrt(var + eps) * (weight * sqrt(eps) / std) + bias. GPT-2's one ln_1 gets ln_1qk's std, and the
    value's rows of c_attn make up for ln_1v's."""
    if model.config.folded or not model.ln_free():
        raise UserError("only an LN-free model that is not folded has a plain form")  # GPT-2 has no lm_head.bias
    new = GPT(replace(model.config, ln_eps=EPS)).to(model.lm_head.weight).eval()
    new.load_state_dict(model.state_dict())
    C = model.config.n_embd
    for old, block in zip(model.transformer.h, new.transformer.h):
        for name in ("ln_1qk", "ln_2"):
            getattr(block, name).weight.mul_(math.sqrt(EPS) / getattr(old, name).avg_std)
        ratio = old.ln_1qk.avg_std.double() / old.ln_1v.avg_std.double()
        W, b = old.attn.c_attn.weight[2 * C :].double(), old.ln_1v.bias
        block.attn.c_attn.weight[2 * C :] = W * ratio
        if b is not None:
            block.attn.c_attn.bias[2 * C :] += W @ b.double() * (1 - ratio)
    new.transformer.ln_f.weight.mul_(math.sqrt(EPS) / model.transformer.ln_f.avg_std)
    return new


def to_bridge(model, **kwargs):
    """An LN-free GPT that is not folded -> TransformerLens 4's TransformerBridge with the same logits and residual
    stream. Its LNs are folded into the weights, as logit_attrs expects.

    kwargs go to boot_transformers: pass tokenizer=AutoTokenizer.from_pretrained(DIRECTORY) for a tokenizer other than
    GPT-2's. Without a tokenizer it takes only token ids."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        plain_form(model).save_pretrained(folder)
        has_tokenizer = "tokenizer" in kwargs or write_tokenizer(model, folder)
        hf = GPT2LMHeadModel.from_pretrained(folder).eval()
        bridge = TransformerBridge.boot_transformers(folder, hf_model=hf, **kwargs)
    if not has_tokenizer:
        bridge.tokenizer = None  # the default one would turn any text into zeros
    bridge.cfg.default_prepend_bos = False  # as in to_hooked: the first token of a text is at position 0
    unchanged = dict(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    bridge.enable_compatibility_mode(disable_warnings=True, **unchanged)
    return bridge


@torch.no_grad()
def to_hooked(model):
    """An LN-free GPT -> a HookedTransformer of TransformerLens 2 or 3, with normalization_type=None."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        raise ImportError("to_hooked needs TransformerLens 2 or 3; to_bridge is for 4") from None

    model = model if model.config.folded else model.fold()
    c = model.config
    sizes = dict(n_layers=c.n_layer, n_heads=c.n_head, d_model=c.n_embd, d_head=c.n_embd // c.n_head,
                 d_mlp=4 * c.n_embd, n_ctx=c.block_size, d_vocab=c.vocab_size)
    hooked = HookedTransformer(HookedTransformerConfig(
        **sizes, act_fn="gelu_new", normalization_type=None, default_prepend_bos=False, init_weights=False,
        device=str(model.lm_head.weight.device)))

    ours = model.hf_tensors()
    state = {
        "embed.W_E": ours["transformer.wte.weight"],
        "pos_embed.W_pos": ours["transformer.wpe.weight"],
        "unembed.W_U": ours["lm_head.weight"].T,
        "unembed.b_U": ours["lm_head.bias"],
    }
    for i in range(c.n_layer):
        attn, mlp, block = f"transformer.h.{i}.attn.", f"transformer.h.{i}.mlp.", f"blocks.{i}."
        W_qkv, b_qkv = ours[attn + "c_attn.weight"], ours[attn + "c_attn.bias"]  # (C, 3 C), (3 C,)
        for letter, W, b in zip("QKV", W_qkv.chunk(3, 1), b_qkv.chunk(3)):
            state[block + f"attn.W_{letter}"] = W.unflatten(1, (c.n_head, -1)).transpose(0, 1)  # (heads, C, C / heads)
            state[block + f"attn.b_{letter}"] = b.unflatten(0, (c.n_head, -1))
        state[block + "attn.W_O"] = ours[attn + "c_proj.weight"].unflatten(0, (c.n_head, -1))  # (heads, C / heads, C)
        state[block + "attn.b_O"] = ours[attn + "c_proj.bias"]
        for name, linear in (("in", "c_fc"), ("out", "c_proj")):
            state[block + f"mlp.W_{name}"] = ours[mlp + linear + ".weight"]
            state[block + f"mlp.b_{name}"] = ours[mlp + linear + ".bias"]
    buffers = {key: t for key, t in hooked.state_dict().items() if key.endswith((".mask", ".IGNORE"))}
    hooked.load_state_dict(state | buffers)
    return hooked.eval()


# --- files


def write_tokenizer(model, folder, directory=""):
    """Copy the tokenizer files in `directory`, or write GPT-2's if the model has its vocabulary. Whether it did."""
    if directory and copy_tokenizer(directory, folder):
        return True
    if model.config.eot != 50256 or model.config.vocab_size < 50257:
        return False
    from tiktoken.load import read_file_cached

    there = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # where tiktoken has them from
    make_tokenizer("gpt2")  # fetches the files once, and checks them
    for name, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(read_file_cached(there + theirs))
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=model.config.block_size, add_prefix_space=False)
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    write_json(os.path.join(folder, "tokenizer_config.json"), config)
    return True


def main():
    source = take_source("python -m tools.export OUT_DIR_OR_MODEL --to=hf, or --to=folded")
    configure(globals(), sys.argv[1:], __doc__, choices=dict(to=("hf", "folded"), dtype=("float32", "bfloat16")))
    directory = model_directory(source)
    folder = out or os.path.join(source, to)
    if not out and directory == source:  # a model, not a run
        folder = os.path.basename(source.partition("@")[0]) + "_" + to
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: remove it, or name another directory with --out")

    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        reasons = model.why_not_ln_free()
        raise UserError(f"{source} is not LN-free ({len(reasons)} reasons): {', '.join(reasons[:6])}")
    new = plain_form(model) if to == "hf" else model if model.config.folded else model.fold()
    idx = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, min(64, model.config.block_size)))
    with torch.no_grad():
        difference = (new(torch.from_numpy(idx))[0] - model(torch.from_numpy(idx))[0]).abs().max().item()
    if not difference < 0.1:
        raise UserError(f"can't export it: the logits would be off by {difference:.2g}; nan: they are not finite")
    rows, why_none = evaluation(source, weights_sha256(model))
    half = unfinished(folder)
    shutil.rmtree(half, ignore_errors=True)  # a kill left it
    try:
        new.to(getattr(torch, dtype)).save_pretrained(half)
        with on_disk(f"can't write {folder}"):
            ends = dict(bos_token_id=model.config.eot, eos_token_id=model.config.eot)
            write_json(os.path.join(half, "generation_config.json"), ends)
            has_tokenizer = write_tokenizer(model, half, directory)
            with open(os.path.join(half, "README.md"), "w") as f:
                f.write(card(source, push or folder, to, has_tokenizer, rows))
            os.rename(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)

    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")
    print(f"in float32, its logits of random tokens are within {difference:.1e} of {source}'s")
    if why_none:
        print(f"note: the card has no evaluation: {why_none}; make one with eval.py --json={source}/eval.json")
    if not has_tokenizer:
        print("note: no tokenizer files: no tokenizer.json beside the model, and its vocabulary is not GPT-2's")
    if to == "hf":
        print("note: it overflows in float16: load it in float32 or bfloat16")
    if push:
        print(f"upload {', '.join(sorted(os.listdir(folder)))} to {hub.constants.ENDPOINT}/{push}? [y/N]")
        if not sys.stdin or sys.stdin.readline().strip().lower() not in ("y", "yes"):
            sys.exit(f"not uploaded; {folder} stays")
        with asking_hub(f"{folder} stays: it can't be uploaded to {push} on",
                        f"log in with `hf auth login`, or upload it with `hf upload {push} {folder}`"):
            hub.create_repo(push, exist_ok=True)
            hub.upload_folder(repo_id=push, folder_path=folder, commit_message="GPT-2 without LayerNorm")
        print(f"uploaded to {hub.constants.ENDPOINT}/{push}")
    say_next(f"{folder}/README.md has the lines that open it in other tools")


if __name__ == "__main__":
    main()
