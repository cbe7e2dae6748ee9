"""
A page on the circuits of a model without LayerNorm, and SOURCE/circuits.png:

    python -m tools.circuits out/remove_ln_tiny

The strongest compositions of heads, the heads that copy, induction heads, and the most connected neurons. A notebook
imports the functions behind it from here: parts/circuits.py has them.
"""
import math
import os
import sys

from parts.errors import UserError, begin_script, command, say_next

if __name__ == "__main__":
    begin_script()  # before the slow imports

import torch

from configurator import configure, take_source
from model import GPT
from parts.circuits import *  # noqa: F403  for notebooks: circuits.components and so on
from parts.circuits import composition, connections, copying, induction_by_weights, prefix_matching, readers
from parts.resemblance import spearman

# -----------------------------------------------------------------------------
top = 8  # rows in each list
out = ""  # the picture; "": circuits.png in SOURCE
# -----------------------------------------------------------------------------


@torch.no_grad()
def most_connected(model, n):
    """[("h.1 neuron 5", weight)]: the n neurons with the largest Frobenius norm of their weights to all later neurons,
    queries, keys, values and logits."""
    reads = readers(model)
    gram, found = model.lm_head.weight.T @ model.lm_head.weight, []  # |W w|^2 = w^T (W^T W) w
    for layer in reversed(range(model.config.n_layer)):
        written = model.transformer.h[layer].mlp.c_proj.weight  # (C, 4 C)
        weights = (written * (gram @ written)).sum(0).sqrt()
        found += [(f"h.{layer} neuron {k}", weight) for (k,), weight in largest(weights, n)]
        for name in ("queries", "keys", "values", "neurons"):
            W = reads[f"h.{layer} {name}"].weight
            gram = gram + W.T @ W
    return sorted(found, key=lambda row: -row[1])[:n]


def largest(scores, n):
    """(L, heads, ...) -> [(indices, score)], the n largest first."""
    flat = scores.flatten()
    chosen = flat.topk(min(n, len(flat))).indices
    return [(torch.unravel_index(k, scores.shape), flat[k].item()) for k in chosen]


def show(model, scores, copies, by_weights, matching, decode):
    chance = 1 / math.sqrt(model.config.n_embd)
    print(f"strongest compositions; random matrices of this shape score about {chance:.3f}")
    rows = [(score, kind, i) for kind in "QKV" for i, score in largest(scores[kind], top)]
    for score, kind, (l1, h1, l2, h2) in sorted(rows, key=lambda row: -row[0])[:top]:
        print(f"  {kind}  h.{l1} head {h1} -> h.{l2} head {h2}{score:>10.3f}{score / chance:>8.1f} x chance")
    print("\ncopying heads: the eigenvalues of W_U OV W_E, their sum over the sum of their sizes, from -1 to 1")
    for (layer, head), score in largest(copies, top):
        print(f"  h.{layer} head {head}{score:>10.3f}")
    print("\ninduction heads: by weights, K-composition above chance with a head that looks at the previous token; by\n"
          "attention, to the token after the last occurrence in a repeated random sequence (an even pattern: "
          f"{math.log(2) / (model.config.block_size // 2):.3f})\n{'':<20}{'weights':>8}{'attention':>12}")
    for (layer, head), score in largest(by_weights, top):
        print(f"  {f'h.{layer} head {head}':<18}{score:>8.4f}{matching[layer, head].item():>12.3f}")
    both = spearman(by_weights.flatten(), matching.flatten()).item()
    print(f"  rank correlation of the two over all heads: {both:.2f}")
    print("\nmost connected neurons: norm of the weights to all that reads them")
    for name, weight in most_connected(model, top):
        (logit, most), = connections(model, name, 1)["to logits"]
        print(f"  {name:<20}{weight:>9.2f}   most to {decode(logit)} ({most:+.2f})")


def draw(model, scores, copies, matching, path):
    from matplotlib.figure import Figure  # a notebook that imports this file needs only torch

    from tools.plot import save

    fig = Figure(figsize=(14, 4.5), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    images = (left.imshow(copies.numpy(), cmap="coolwarm", vmin=-1, vmax=1),
              middle.imshow(matching.numpy(), cmap="Blues", vmin=0, vmax=max(0.1, matching.max().item())))
    titles = "copying score", "attention to the token after the last occurrence"
    for axis, image, title, values in zip((left, middle), images, titles, (copies, matching)):
        fig.colorbar(image, ax=axis, shrink=0.7)
        axis.set(title=title, xlabel="head", ylabel="layer", xticks=range(values.shape[1]), yticks=range(len(values)))
    later = torch.ones(model.config.n_layer, model.config.n_layer, dtype=torch.bool).triu(1)
    for kind, color in zip("QKV", ("tab:purple", "tab:green", "tab:brown")):
        values = scores[kind].permute(0, 2, 1, 3)[later].flatten().sort(descending=True).values
        right.plot(range(1, len(values) + 1), values.tolist(), color=color, label=f"{kind}-composition")
    right.axhline(1 / math.sqrt(model.config.n_embd), color="black", linewidth=0.8, label="random matrices")
    right.set(title="composition of all pairs of heads", xlabel="pair, the strongest first", xscale="log")
    right.legend()
    save(fig, path)


def main():
    from parts.run import model_directory
    from parts.tokenizer import tokenizer_of
    from tools.plot import check_picture

    source = take_source("python -m tools.circuits OUT_DIR_OR_MODEL")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(top=1))
    path = out or (os.path.join(source, "circuits.png") if os.path.isdir(source) else "circuits.png")
    check_picture(path)
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        raise UserError(f"{source} is not LN-free: {model.why_not_ln_free()[0]}")
    model = model if model.config.folded else model.fold()
    model.requires_grad_(False)
    scores, copies, matching = composition(model), copying(model), prefix_matching(model)
    try:
        tokenizer = tokenizer_of(model, directory)
    except UserError:
        tokenizer = None

    def decode(name):
        """"logit 65" -> "'A'", if the tokenizer is known."""
        token = int(name.split()[1])
        return repr(tokenizer.decode([token])) if tokenizer and token < tokenizer.vocab_size else name

    show(model, scores, copies, induction_by_weights(model, scores), matching, decode)
    draw(model, scores, copies, matching, path)
    say_next(command("tools.lens", source, "--prompt=TEXT"))


if __name__ == "__main__":
    main()
