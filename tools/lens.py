"""
What each part of a model contributes to one logit: exactly, without LayerNorm.

    python -m tools.lens out/remove_ln_tiny --prompt="def read(self, "
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --token=" Paris"

Without LN a logit is a sum: of the token's and the position's embedding, each head, each MLP and the
biases, all read by one row of the unembedding. With LN it is not. The usual way out is to hold the last
LN's std fixed at what was observed; then the parts sum up too, but a part's share is not what the logit
loses with it, as the std depends on all of them. Both are shown, for the LN-free model and its original:
the table in the terminal, and a picture in SOURCE/lens.png.

Everything is at the prompt's last position. A part's effect is its direct one: what it adds to the
residual stream that the unembedding reads, not what later layers make of it.
"""
import os
import sys

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from configurator import configure, take_source
from model import GPT, std_of
from parts.files import run_settings
from parts.run import model_directory
from parts.tokenizer import tokenizer_of
from tools.plot import check_picture, save

# -----------------------------------------------------------------------------
prompt = ""  # the text; the logit is that of what comes next
token = ""  # whose logit: a text that is one token; "": the one that the LN-free model finds likeliest
original = ""  # the model with LN to stand beside it; "": the one that the run began with
top = 12  # >= 1: lines of the table, the largest contributions first
out = ""  # of the picture; "": lens.png in SOURCE
# -----------------------------------------------------------------------------

TITLE = "contributions to a logit"  # in the picture's file


@torch.no_grad()
def parts_of(model, ids):
    """ids (T,) -> {name: what it adds to the residual stream at the last position, (C,)}, which sum up
    to that stream before the last norm."""
    parts = {}
    T = len(ids)
    parts["token embedding"] = model.transformer.wte.weight[ids[-1]]
    parts["position embedding"] = model.transformer.wpe.weight[T - 1]
    hooks = []
    for i, block in enumerate(model.transformer.h):

        def see_heads(c_proj, args, i=i):
            heads = args[0][0, -1].view(model.config.n_head, -1)  # (heads, C / heads)
            weights = c_proj.weight.view(-1, *heads.shape)  # (C, heads, C / heads)
            for head in range(len(heads)):
                parts[f"h.{i} head {head}"] = weights[:, head] @ heads[head]
            if c_proj.bias is not None:
                parts[f"h.{i} attention bias"] = c_proj.bias

        def see_mlp(mlp, args, out, i=i):
            parts[f"h.{i} MLP"] = out[0, -1]

        hooks.append(block.attn.c_proj.register_forward_pre_hook(see_heads))
        hooks.append(block.mlp.register_forward_hook(see_mlp))
    try:
        model(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return parts


@torch.no_grad()
def reader(model, x):
    """Rows (vocab, C) and numbers (vocab,) with which logits are read off a residual stream: rows @
    stream + numbers. Exact without LN; with LN the std is held at that of x (C,)."""
    if model.config.folded:
        return model.lm_head.weight, model.lm_head.bias
    ln_f = model.transformer.ln_f
    W = model.lm_head.weight
    rows = W * ln_f.weight / std_of(x, ln_f.eps)
    numbers = torch.zeros(len(W)) if ln_f.bias is None else W @ ln_f.bias
    return rows - rows.mean(1, keepdim=True), numbers  # centring


@torch.no_grad()
def logit_of(model, x, target):
    """The logit of target that the model reads off a residual stream x (C,), with x's own std."""
    nowhere = torch.tensor(False)
    return model.lm_head(model.final_norm(x[None, None], nowhere))[0, 0, target]


def contributions(model, parts, target):
    """({part: (its share of target's logit, what that logit loses when the part is taken out)}, the
    share of the last biases, which are no part's, the logit)."""
    x = sum(parts.values())
    rows, numbers = reader(model, x)
    logit = logit_of(model, x, target)
    found = {}
    for name, part in parts.items():
        lost = logit - logit_of(model, x - part, target)
        found[name] = (rows[target] @ part).item(), lost.item()
    return found, numbers[target].item(), logit.item()


def layer_by_layer(model, parts, target):
    """The logit lens: [(after which layer, the logit of target, the likeliest token)], read off the
    stream after each layer as it is read after the last."""
    rows, numbers = reader(model, sum(parts.values()))
    x = parts["token embedding"] + parts["position embedding"]
    found = []
    for name in ["embedding", *(f"h.{i}" for i in range(model.config.n_layer))]:
        x = x + sum(part for key, part in parts.items() if key.startswith(name + " "))
        logits = rows @ x + numbers
        found.append((name, logits[target].item(), logits.argmax().item()))
    return found


def by_size(shares):
    """The names of the parts, the largest share first."""
    return sorted(shares, key=lambda name: abs(shares[name][0]), reverse=True)


def show(free, with_ln, tokenizer, target):
    """The table: parts by their share, and what holding the std gets wrong of it. free and with_ln are what
    contributions returned for the two models."""
    shares, number, logit = free
    old_shares, old_number, old_logit = with_ln
    print(f"the logit of {tokenizer.decode([target])!r} after {prompt!r}\n")
    print(f"{'':<20}{'LN-free':>10}{'original, std held':>20}{'really lost':>13}{'error':>10}")
    names = by_size(shares)
    for name in names[:top]:
        share, lost = old_shares[name]
        print(f"{name:<20}{shares[name][0]:>10.4f}{share:>20.4f}{lost:>13.4f}{share - lost:>+10.4f}")
    rest = names[top:]
    line(f"{len(rest)} more parts", sum_of(shares, rest), sum_of(old_shares, rest))
    line("last biases", number, old_number)
    line("sum", sum_of(shares, names) + number, sum_of(old_shares, names) + old_number)
    line("the logit itself", logit, old_logit)


def sum_of(shares, names):
    return sum(shares[name][0] for name in names)


def line(name, free, with_ln):
    print(f"{name:<20}{free:>10.4f}{with_ln:>20.4f}")


def show_layers(free, with_ln, tokenizer):
    print("\nthe logit lens: that logit, and the likeliest token, after each layer\n")
    print(f"{'':<12}{'LN-free':>10}{'':<14}{'original, std held':>20}")
    for (name, logit, likeliest), (_, old_logit, old_likeliest) in zip(free, with_ln):
        words = [shown(tokenizer, token_id) for token_id in (likeliest, old_likeliest)]
        print(f"{name:<12}{logit:>10.4f}  {words[0]:<12}{old_logit:>20.4f}  {words[1]}")


def shown(tokenizer, token_id):
    if token_id >= tokenizer.vocab_size:  # a model may have more ids, which are never trained
        return f"id {token_id}"
    return repr(tokenizer.decode([token_id]))[:12]


def draw(free, with_ln, path, title):
    """Shares of the LN-free model as bars, and of both models the share against the loss; arguments as show's."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    shares = free[0]
    names = by_size(shares)[:20][::-1]
    left.barh(names, [shares[name][0] for name in names], color="tab:red")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("share of the logit, LN-free: these sum up to it")
    left.set_title(title.replace("$", r"\$"), fontsize=10)  # no formula
    for found, label, color in ((with_ln[0], "original, std held", "tab:blue"), (free[0], "LN-free", "tab:red")):
        predicted, lost = zip(*found.values())
        right.plot(predicted, lost, "o", color=color, label=label, markersize=4, alpha=0.7)
    ends = [*right.get_xlim(), *right.get_ylim()]
    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="equal")
    right.set_xlabel("share of the logit, as predicted")
    right.set_ylabel("what the logit loses without the part")
    right.legend()
    save(fig, path, TITLE)


def target_of(tokenizer, model, ids):
    if not token:
        with torch.no_grad():
            return model(ids[None])[0][0, -1, : tokenizer.vocab_size].argmax().item()
    found = tokenizer.encode(token).tolist()
    if len(found) != 1:
        raise UserError(f"--token={token!r} is {len(found)} tokens, and a logit is of one")
    return found[0]


def main():
    source = take_source("python -m tools.lens OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1:], __doc__)
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        raise UserError(f"{source} is not LN-free: {model.why_not_ln_free()[0]}")
    tokenizer = tokenizer_of(model, directory)
    free = model if model.config.folded else model.fold()
    beside = original or run_settings(source).get("init_from", "")
    if not beside or beside == "scratch":
        raise UserError(f"no original to stand beside {source}: name it with --original=DIRECTORY")
    with_ln = GPT.from_pretrained(model_directory(beside)).eval()
    if "fake" in with_ln.ln_modes().values() or with_ln.config.folded:
        raise UserError(f"{beside} is no original: its LayerNorms are gone")
    if with_ln.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{beside} has another vocabulary than {source}")
    ids = torch.tensor(tokenizer.encode(prompt).astype("int64"))
    if not len(ids):
        raise UserError("a prompt is needed: --prompt=TEXT")
    most = min(model.config.block_size, with_ln.config.block_size)
    if len(ids) > most:
        raise UserError(f"the prompt has {len(ids)} tokens, and the models see {most}")
    path = out or (os.path.join(source, "lens.png") if os.path.isdir(source) else "lens.png")

    check_picture(path, TITLE)
    target = target_of(tokenizer, free, ids)
    parts, old_parts = parts_of(free, ids), parts_of(with_ln, ids)
    found = contributions(free, parts, target)
    old = contributions(with_ln, old_parts, target)
    show(found, old, tokenizer, target)
    show_layers(layer_by_layer(free, parts, target), layer_by_layer(with_ln, old_parts, target), tokenizer)
    print()
    draw(found, old, path, f"{tokenizer.decode([target])!a} after {prompt[-40:]!a}")  # any font has these letters
    print(f"next: python -m tools.export {source} --to=hf")


if __name__ == "__main__":
    main()
