"""
What each component of a model contributes to one logit: direct logit attribution, exact without LayerNorm.

    python -m tools.lens out/remove_ln_tiny --prompt="def read(self, "
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --token=" Paris"

Without LN a logit is the sum of what the embeddings, each head, each MLP and the biases contribute. With LN it is not.
The usual way out holds the std of the last LN fixed. Then the contributions sum up to the logit, but ablating a
component changes the logit by something else, because it changes the std as well. The table and the picture,
SOURCE/lens.png, show both for the LN-free model and its original.

Everything is at the prompt's last position, and direct: what a component writes into the residual stream that the
unembedding reads, not what later layers make of it.
"""
import os
import sys
import textwrap

from parts.errors import UserError, begin_script, command, say_next

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from matplotlib.figure import Figure

from configurator import configure, take_source
from model import GPT, std_of
from parts.files import run_settings
from parts.run import load_teacher, model_directory
from parts.tokenizer import tokenizer_of
from tools.plot import ROLES, check_picture, save

# -----------------------------------------------------------------------------
prompt = ""  # the text; the logit is for the token after it
token = ""  # whose logit: a text of one token; "": the likeliest one of the LN-free model
original = ""  # the model with LN to compare with; "": the one that the run started from
top = 12  # components in the table, the largest contributions first
out = ""  # the picture; "": lens.png in SOURCE
# -----------------------------------------------------------------------------


@torch.no_grad()
def components_of(model, ids):
    """ids (T,) -> {component: what it adds to the residual stream at the last position, (C,)}. They sum up to the
    stream before the last norm."""
    found = {
        "token embedding": model.transformer.wte.weight[ids[-1]],
        "position embedding": model.transformer.wpe.weight[len(ids) - 1],
    }
    seen = {}  # {module: its input and its output, at the last position}

    def see(module, args, out):
        seen[module] = args[0][0, -1], out[0, -1]

    blocks = model.transformer.h
    hooks = [module.register_forward_hook(see) for block in blocks for module in (block.attn.c_proj, block.mlp)]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    for i, block in enumerate(blocks):
        c_proj = block.attn.c_proj
        heads = seen[c_proj][0].view(model.config.n_head, -1)  # (heads, C / heads)
        weights = c_proj.weight.view(-1, *heads.shape)  # (C, heads, C / heads)
        for head in range(len(heads)):
            found[f"h.{i} head {head}"] = weights[:, head] @ heads[head]
        if c_proj.bias is not None:
            found[f"h.{i} attention bias"] = c_proj.bias
        found[f"h.{i} MLP"] = seen[block.mlp][1]
    return found


@torch.no_grad()
def unembedding(model, x):
    """W (vocab, C) and b (vocab,): the logits are W @ stream + b, with LN while the std is held at that of x (C,)."""
    W = model.lm_head.weight
    if model.config.folded:
        return W, model.lm_head.bias
    ln_f = model.transformer.ln_f
    b = torch.zeros(len(W)) if ln_f.bias is None else W @ ln_f.bias
    W = W * ln_f.weight / std_of(x, ln_f.eps)
    return W - W.mean(1, keepdim=True), b  # centring


@torch.no_grad()
def logit_of(model, x, target):
    """The logit of target that the model reads off a residual stream x (C,), with x's own std."""
    return model.lm_head(model.final_norm(x[None, None], torch.tensor(False)))[0, 0, target]


def attribute(model, components, target):
    """({component: (contribution to target's logit, effect of ablating the component on it)}, the largest contribution
    first; the unembedding's bias; the logit)."""
    x = sum(components.values())
    W, b = unembedding(model, x)
    logit = logit_of(model, x, target)
    found = {name: ((W[target] @ component).item(), (logit - logit_of(model, x - component, target)).item())
             for name, component in components.items()}
    largest_first = sorted(found.items(), key=lambda item: -abs(item[1][0]))
    return dict(largest_first), b[target].item(), logit.item()


def logit_lens(model, components, target):
    """[(layer, the logit of target, the likeliest token)]: the stream after each layer, read as after the last one."""
    W, b = unembedding(model, sum(components.values()))
    x = components["token embedding"] + components["position embedding"]
    found = []
    for layer in ["embedding", *(f"h.{i}" for i in range(model.config.n_layer))]:
        x = x + sum(component for name, component in components.items() if name.startswith(layer + " "))
        logits = W @ x + b
        found.append((layer, logits[target].item(), logits.argmax().item()))
    return found


def show(free, with_ln):
    """The table of what attribute returned for the two models. Effect and error are those of the one with LN."""
    (found, *mine), (old, *theirs) = free, with_ln  # the bias and the logit of each
    print(f"{'':<20}{'contribution':>13}{'original, std held':>20}{'measured effect':>17}{'error':>9}")
    names = list(found)
    for name in names[:top]:
        contribution, effect = old[name]
        print(f"{name:<20}{found[name][0]:>13.4f}{contribution:>20.4f}{effect:>17.4f}{contribution - effect:>+9.4f}")
    both = np.array([[model[name][0] for name in names] for model in (found, old)])  # (2, components)
    biases, logits = np.transpose([mine, theirs])
    for name, numbers in ((f"{len(names[top:])} more components", both[:, top:].sum(1)), ("unembedding bias", biases),
                          ("sum", both.sum(1) + biases), ("the logit itself", logits)):
        print(f"{name:<20}{numbers[0]:>13.4f}{numbers[1]:>20.4f}")


def show_layers(free, with_ln, tokenizer):
    """The table of what logit_lens returned for the two models."""
    print("\nthe logit lens: that logit, and the likeliest token, after each layer\n")
    print(f"{'':<12}{'LN-free':>10}{'':<14}{'original, std held':>20}")
    for (layer, *numbers), (_, *old_numbers) in zip(free, with_ln):
        line = f"{layer:<12}"
        for (logit, likeliest), width in ((numbers, 10), (old_numbers, 20)):
            known = likeliest < tokenizer.vocab_size  # a model may have more ids, which are never trained
            word = repr(tokenizer.decode([likeliest])) if known else f"id {likeliest}"
            line += f"{logit:>{width}.4f}  {word[:12]:<12}"
        print(line.rstrip())


def draw(found, old, path, title):
    """Left: the largest contributions, LN-free. Right: contribution against measured effect of ablation, of both."""
    fig = Figure(figsize=(13, 6), layout="constrained")
    left, right = fig.subplots(1, 2)
    names = list(found)[:20][::-1]
    left.barh(names, [found[name][0] for name in names], color=ROLES["ln_free"])
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel(f"contribution to the logit, LN-free: the {len(names)} largest of {len(found)}")
    left.set_title(title.replace("$", r"\$"), fontsize=10)  # no formula
    for pairs, label, role in ((old, "original, std held", "original"), (found, "LN-free", "ln_free")):
        right.plot(*zip(*pairs.values()), "o", color=ROLES[role], label=label, markersize=4, alpha=0.7)
    right.axline((0, 0), slope=1, color="black", linewidth=0.8, label="equal")
    right.set_xlabel("contribution")
    right.set_ylabel("measured effect of ablation")
    right.legend()
    save(fig, path)


def main():
    source = take_source("python -m tools.lens OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(top=1))
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        raise UserError(f"{source} is not LN-free: {model.why_not_ln_free()[0]}")
    tokenizer = tokenizer_of(model, directory)
    ids = torch.tensor(tokenizer.encode(prompt).astype("int64"))
    if not 0 < len(ids) <= model.config.block_size:
        raise UserError(f"--prompt has {len(ids)} tokens, but must have 1 to {model.config.block_size}")
    with_ln = load_teacher(original or run_settings(source).get("init_from", "scratch"), model, len(ids), "original")
    path = out or (os.path.join(source, "lens.png") if os.path.isdir(source) else "lens.png")
    check_picture(path)

    free = model if model.config.folded else model.fold()
    named = tokenizer.encode(token).tolist()
    if token and len(named) != 1:
        raise UserError(f"--token={token!r} must be one token, but is {len(named)}")
    target = named[0] if token else free(ids[None])[0][0, -1, : tokenizer.vocab_size].argmax().item()
    components, old_components = components_of(free, ids), components_of(with_ln, ids)
    found, old = attribute(free, components, target), attribute(with_ln, old_components, target)
    print(f"the logit of {tokenizer.decode([target])!r} after {prompt!r}\n")
    show(found, old)
    show_layers(logit_lens(free, components, target), logit_lens(with_ln, old_components, target), tokenizer)
    print()
    last_words = textwrap.shorten(prompt[::-1], 60, placeholder="...")[::-1]
    draw(found[0], old[0], path, f"{tokenizer.decode([target])!a} after {last_words!a}")  # any font has ASCII
    say_next(command("tools.export", source, "--to=hf"))


if __name__ == "__main__":
    main()
