"""
What each component of a model contributes to one logit. Without LayerNorm the answer is exact.

    python -m tools.lens out/remove_ln_tiny --prompt="def read(self, "
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --token=" Paris"

Without LN a logit is a sum of contributions: each component (the two embeddings, each head, each MLP, the biases) adds
a vector to the residual stream, and the unembedding reads the sum. With LN the usual approximation holds the last LN's
std at its observed value. The contributions still sum to the logit, but ablating a component also changes the std, so
the measured effect is a different number. The table and SOURCE/lens.png show both, for the LN-free model and its
original.

Everything is at the prompt's last position. Contributions are direct: what a component writes for the unembedding to
read, not what later layers make of it.
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
prompt = ""  # the text; the logit is that of the next token
token = ""  # which logit: a text that is one token; "": the LN-free model's likeliest
original = ""  # the model with LN to compare with; "": the one that the run began with
top = 12  # lines of the table, the largest contributions first
out = ""  # the picture; "": lens.png in SOURCE
# -----------------------------------------------------------------------------


@torch.no_grad()
def components_of(model, ids):
    """ids (T,) -> {component: what it adds to the residual stream at the last position, (C,)}. They sum to the stream
    before the last LN."""
    found = {}
    found["token embedding"] = model.transformer.wte.weight[ids[-1]]
    found["position embedding"] = model.transformer.wpe.weight[len(ids) - 1]
    hooks = []
    for i, block in enumerate(model.transformer.h):

        def see_heads(c_proj, args, i=i):
            heads = args[0][0, -1].view(model.config.n_head, -1)  # (heads, C / heads)
            weights = c_proj.weight.view(-1, *heads.shape)  # (C, heads, C / heads)
            for head in range(len(heads)):
                found[f"h.{i} head {head}"] = weights[:, head] @ heads[head]
            if c_proj.bias is not None:
                found[f"h.{i} attention bias"] = c_proj.bias

        def see_mlp(mlp, args, out, i=i):
            found[f"h.{i} MLP"] = out[0, -1]

        hooks.append(block.attn.c_proj.register_forward_pre_hook(see_heads))
        hooks.append(block.mlp.register_forward_hook(see_mlp))
    try:
        model(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def unembedding(model, x):
    """W (vocab, C) and b (vocab,) with logits = W @ stream + b. Exact without LN; with LN, the std is that of the
    residual stream x (C,)."""
    if model.config.folded:
        return model.lm_head.weight, model.lm_head.bias
    ln_f, W = model.transformer.ln_f, model.lm_head.weight
    b = torch.zeros(len(W)) if ln_f.bias is None else W @ ln_f.bias
    W = W * ln_f.weight / std_of(x, ln_f.eps)
    return W - W.mean(1, keepdim=True), b  # centring


@torch.no_grad()
def logit_of(model, x, target):
    """The logit of token `target` for a residual stream x (C,), with x's own std."""
    return model.lm_head(model.final_norm(x[None, None], torch.tensor(False)))[0, 0, target]


def contributions(model, components, target):
    """({component: (contribution to target's logit, measured effect of its ablation)}, the last biases' contribution,
    the logit)."""
    x = sum(components.values())
    W, b = unembedding(model, x)
    logit = logit_of(model, x, target)
    found = {}
    for name, vector in components.items():
        effect = logit - logit_of(model, x - vector, target)
        found[name] = (W[target] @ vector).item(), effect.item()
    return found, b[target].item(), logit.item()


def logit_lens(model, components, target):
    """[(layer, the logit of target, the likeliest token)] with each layer's stream read like the last one."""
    W, b = unembedding(model, sum(components.values()))
    x = components["token embedding"] + components["position embedding"]
    found = []
    for layer in ["embedding", *(f"h.{i}" for i in range(model.config.n_layer))]:
        x = x + sum(vector for name, vector in components.items() if name.startswith(layer + " "))
        logits = W @ x + b
        found.append((layer, logits[target].item(), logits.argmax().item()))
    return found


def by_size(found):
    return sorted(found, key=lambda name: abs(found[name][0]), reverse=True)


def show(free, with_ln, words):
    """The table of contributions; free and with_ln are what `contributions` returned for the two models."""
    (found, bias, logit), (old, old_bias, old_logit) = free, with_ln
    print(f"the logit of {words}\n")
    print(f"{'':<20}{'LN-free':>10}{'original, std held':>20}{'measured effect':>17}{'error':>10}")
    names = by_size(found)
    for name in names[:top]:
        contribution, effect = old[name]
        print(f"{name:<20}{found[name][0]:>10.4f}{contribution:>20.4f}{effect:>17.4f}{contribution - effect:>+10.4f}")
    rest, old_rest = (sum(values[name][0] for name in names[top:]) for values in (found, old))
    total, old_total = (sum(contribution for contribution, _ in values.values()) for values in (found, old))
    for name, a, b in ((f"{len(names[top:])} more", rest, old_rest), ("last biases", bias, old_bias),
                       ("sum", total + bias, old_total + old_bias), ("the logit itself", logit, old_logit)):
        print(f"{name:<20}{a:>10.4f}{b:>20.4f}")


def show_lens(free, with_ln, tokenizer):
    def word(token_id):
        if token_id >= tokenizer.vocab_size:  # a padded vocabulary has ids that are never trained
            return f"id {token_id}"
        return repr(tokenizer.decode([token_id]))[:12]

    print("\nthe logit lens: the same logit, and the likeliest token, after each layer\n")
    print(f"{'':<12}{'LN-free':>10}{'':<14}{'original, std held':>20}")
    for (layer, logit, likeliest), (_, old_logit, old_likeliest) in zip(free, with_ln):
        print(f"{layer:<12}{logit:>10.4f}  {word(likeliest):<12}{old_logit:>20.4f}  {word(old_likeliest)}")


def draw(free, with_ln, path, title):
    """Left: the largest contributions, LN-free. Right: contribution against measured effect of ablation, both models.
    Arguments as in show."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    names = by_size(free[0])[:20][::-1]
    left.barh(names, [free[0][name][0] for name in names], color="tab:red")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel(f"contribution to the logit, LN-free: the {len(names)} largest of {len(free[0])}")
    left.set_title(title.replace("$", r"\$"), fontsize=10)  # no formula
    for found, label, color in ((with_ln[0], "original, std held", "tab:blue"), (free[0], "LN-free", "tab:red")):
        right.plot(*zip(*found.values()), "o", color=color, label=label, markersize=4, alpha=0.7)
    ends = [*right.get_xlim(), *right.get_ylim()]
    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="equal")
    right.set_xlabel("contribution to the logit")
    right.set_ylabel("measured effect of ablation")
    right.legend()
    save(fig, path)


def main():
    source = take_source("python -m tools.lens OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(top=1))
    path = out or (os.path.join(source, "lens.png") if os.path.isdir(source) else "lens.png")
    check_picture(path)
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        raise UserError(f"{source} is not LN-free: {model.why_not_ln_free()[0]}")
    with_ln_source = original or run_settings(source).get("init_from", "scratch")
    if with_ln_source == "scratch":
        raise UserError(f"{source} has no original to compare with: name one with --original=DIRECTORY")
    with_ln = GPT.from_pretrained(model_directory(with_ln_source)).eval()
    if with_ln.any_removed() or with_ln.config.folded:
        raise UserError(f"--original={with_ln_source} has lost LayerNorms of its own")
    if with_ln.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{with_ln_source} has another vocabulary than {source}")
    tokenizer = tokenizer_of(model, directory)
    ids = torch.tensor(tokenizer.encode(prompt).astype("int64"))
    longest = min(model.config.block_size, with_ln.config.block_size)
    if not 0 < len(ids) <= longest:
        raise UserError(f"--prompt has {len(ids)} tokens, but needs 1 to {longest}")
    free = model if model.config.folded else model.fold()
    if token:
        target, *more = tokenizer.encode(token).tolist()
        if more:
            raise UserError(f"--token={token!r} is {1 + len(more)} tokens, but must be one")
    else:
        with torch.no_grad():
            target = free(ids[None])[0][0, -1, : tokenizer.vocab_size].argmax().item()

    components, old_components = components_of(free, ids), components_of(with_ln, ids)
    found = contributions(free, components, target)
    old = contributions(with_ln, old_components, target)
    show(found, old, f"{tokenizer.decode([target])!r} after {prompt!r}")
    show_lens(logit_lens(free, components, target), logit_lens(with_ln, old_components, target), tokenizer)
    print()
    end = prompt if len(prompt) <= 60 else "... " + prompt[-56:].partition(" ")[2]
    draw(found, old, path, f"{tokenizer.decode([target])!a} after {end!a}")  # every font has ASCII
    print(f"next: python -m tools.export {source} --to=hf")


if __name__ == "__main__":
    main()
