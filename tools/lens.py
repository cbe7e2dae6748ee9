"""
What each component of a model contributes to something that the model reads off its residual stream: exact without
LayerNorm.

    python -m tools.lens out/remove_ln_tiny --prompt="def read(self, "              # the logit of the likeliest token
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --of="logit: Paris"
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --of="h.7 neuron 123" --position=2
    python -m tools.lens out/remove_ln --prompt="The Eiffel Tower is in" --of="h.9 head 6: 5 -> 3"

A logit, or a neuron's value before the GELU, is a sum over the components that were written before it; a head's
attention score, here of the query at position 5 with the key at position 3, is a sum over pairs of them.

With LN it is not. The usual way out holds each token's std fixed. Then the contributions sum up as well, but ablating a
component changes the value by something else, because it changes the std too. The table and the picture,
SOURCE/lens.png, show both for the LN-free model and its original. Everything is direct: what a component writes into
the stream that is read, not what later layers make of it.
"""
import itertools
import math
import os
import re
import sys
import textwrap

from parts.errors import UserError, begin_script, command, say_next

if __name__ == "__main__":
    begin_script()  # before the slow imports

import torch
from matplotlib.figure import Figure

from configurator import configure, take_source
from model import GPT
from parts.circuits import attention_scores, components, contributions, head_rows, parse, readers
from parts.files import run_settings
from parts.run import model_directory
from parts.tokenizer import tokenizer_of
from tools.plot import ROLES, check_picture, save

# -----------------------------------------------------------------------------
prompt = ""  # the text
of = ""  # what is read: "logit: TOKEN", "h.7 neuron 123" or "h.9 head 6: 5 -> 3"; "": the logit of the likeliest token
position = -1  # the token at which it is read, counted from 0; -1: the last
original = ""  # the model with LN to compare with; "": the one that the run started from
top = 12  # rows in the table, the largest contributions first
out = ""  # the picture; "": lens.png in SOURCE
# -----------------------------------------------------------------------------


@torch.no_grad()
def attribute(model, ids, name, row, at):
    """What the components contribute to a row of the reader `name`, such as "logits", at position `at` of ids (T,):
    ({component: (contribution, effect of ablating it)}, bias, the value that the model computes)."""
    written, reader = components(model, ids), readers(model)[name][[row]]
    stream = written.stream(reader)[at]  # (C,)
    writes = written.writes[: written.before(reader), at]  # (components, C)

    def value(streams):
        return (streams @ reader.weight[0]) / reader.scale(streams).squeeze(1) + reader.bias

    effects = value(stream[None]) - value(stream - writes)
    found = contributions(written, reader)[:, at, 0]
    pairs = zip(found.tolist(), effects.tolist())
    return dict(zip(written.names, pairs)), reader.bias.item(), computed(model, ids, name)[at, row].item()


@torch.no_grad()
def attribute_score(model, ids, layer, head, query, key):
    """What pairs of components contribute to a head's attention score: ({(query side, key side): (contribution, effect
    of ablating both, less those of each alone)}, 0, the score that the model computes)."""
    scores, d = attention_scores(model, ids, layer, head), model.config.n_embd // model.config.n_head
    written, reads, rows, sides, values = components(model, ids), readers(model), head_rows(model, head), [], []
    for name, at in (("queries", query), ("keys", key)):
        reader = reads[f"h.{layer} {name}"][rows]
        stream = written.stream(reader)[at]
        streams = torch.cat([stream[None], stream - written.writes[: written.before(reader), at]])
        read = streams @ reader.weight.T / reader.scale(streams)  # (components + 1, C / heads)
        sides.append(torch.cat([read[0] - read[1:], reader.bias[None]]))
        values.append(computed(model, ids, f"h.{layer} {name}")[at, rows])
    effects = sides[0] @ sides[1].T / math.sqrt(d)
    names = itertools.product(scores.names, scores.names)
    pairs = zip(scores.pairs(query, key).flatten().tolist(), effects.flatten().tolist())
    return dict(zip(names, pairs)), 0.0, (values[0] @ values[1]).item() / math.sqrt(d)


def computed(model, ids, name):
    """What the model itself computes for the rows of a reader, (T, rows)."""
    layer, _, kind = name.rpartition(" ")
    module = model.lm_head
    if layer:
        block = model.transformer.h[int(layer[2:])]
        module = block.mlp.c_fc if kind == "neurons" else block.attn
    found = []

    def see(module, args, out=None):
        found.append(out[0] if kind in ("neurons", "logits") else module.query_key_value(*args[:2]))

    hook = module.register_forward_hook(see)
    model(ids[None])
    hook.remove()
    if kind in ("neurons", "logits"):
        return found[0]
    return found[0][("queries", "keys", "values").index(kind)][0]


@torch.no_grad()
def logit_lens(model, ids, at, target):
    """[(layer, the logit of target, the likeliest token)] at a position: the stream after each layer, read as after the
    last one, with its std."""
    written, reads, found = components(model, ids), readers(model), []
    logits = reads["logits"]
    scale = logits.scale(written.stream(logits))[at]
    layers = [f"h.{i}" for i in range(model.config.n_layer)]
    for layer, name in zip(["embedding", *layers], [*(f"{layer} queries" for layer in layers), "logits"]):
        values = logits.weight @ written.stream(reads[name])[at] / scale + logits.bias
        found.append((layer, values[target].item(), values.argmax().item()))
    return found


def show(what, free, with_ln):
    """The table of what attribute or attribute_score returned for the two models."""
    (found, *mine), (old, *theirs) = free, with_ln
    names = largest(found)
    label = {name: name if isinstance(name, str) else " x ".join(map(shortened, name)) for name in names}
    width = max(20, *(len(label[name]) for name in names[:top]))
    print(f"{'':<{width}}   LN-free  original: std held, measured, error")
    for name in names[:top]:
        contribution, effect = old[name]
        print(f"{label[name]:<{width}}{found[name][0]:>10.4f}{contribution:>10.4f}{effect:>10.4f}"
              f"{contribution - effect:>+10.4f}")
    rest, sums = names[top:], [sum(value for value, _ in model.values()) for model in (found, old)]
    lines = {f"{len(rest)} more": [sum(model[name][0] for name in rest) for model in (found, old)]}
    if mine[0] or theirs[0]:
        lines["bias"] = mine[0], theirs[0]
    lines["sum"] = sums[0] + mine[0], sums[1] + theirs[0]
    lines[f"the {what} itself"] = mine[1], theirs[1]
    for name, (number, old_number) in lines.items():
        print(f"{name:<{width}}{number:>10.4f}{old_number:>10.4f}")


def largest(found):
    return sorted(found, key=lambda name: -abs(found[name][0]))


def shortened(name):
    return name.replace("attention bias", "attn bias").replace(" embedding", "")


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
    """Left: the largest contributions of the LN-free model, or a heat map of pairs. Right: contribution against
    measured effect of ablation, of both models."""
    fig = Figure(figsize=(13, 6), layout="constrained")
    left, right = fig.subplots(1, 2)
    names = largest(found)[:20][::-1]
    if isinstance(names[0], str):
        left.barh(names, [found[name][0] for name in names], color=ROLES["ln_free"])
        left.axvline(0, color="black", linewidth=0.8)
        left.set_xlabel(f"contribution, LN-free: the {len(names)} largest of {len(found)}")
    else:
        sides = [list(dict.fromkeys(name[side] for name in names[::-1])) for side in (0, 1)]
        values = [[found[a, b][0] for b in sides[1]] for a in sides[0]]
        limit = max(abs(value) for row in values for value in row)
        fig.colorbar(left.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit), ax=left, shrink=0.7)
        left.set_xticks(range(len(sides[1])), map(shortened, sides[1]), rotation=90, fontsize=8)
        left.set_yticks(range(len(sides[0])), map(shortened, sides[0]), fontsize=8)
        left.set(xlabel="key side", ylabel="query side")
    left.set_title(title.replace("$", r"\$"), fontsize=10)  # no formula
    for pairs, label, role in ((old, "original, std held", "original"), (found, "LN-free", "ln_free")):
        right.plot(*zip(*pairs.values()), "o", color=ROLES[role], label=label, markersize=4, alpha=0.7)
    ends = [*right.get_xlim(), *right.get_ylim()]
    right.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8, label="equal")
    right.set_xlabel("contribution")
    right.set_ylabel("measured effect of ablation")
    right.legend()
    save(fig, path)


def open_models(source, directory):
    """The folded model and the original, which has all its LNs and the same shape. UserError."""
    model = GPT.from_pretrained(directory).eval()
    if not model.ln_free():
        raise UserError(f"{source} is not LN-free: {model.why_not_ln_free()[0]}")
    name = original or run_settings(source).get("init_from", "scratch")
    if name == "scratch":
        raise UserError(f"no original to compare {source} with: name it with --original=DIRECTORY")
    with_ln = GPT.from_pretrained(model_directory(name)).eval()
    if with_ln.any_removed() or with_ln.config.folded:
        raise UserError(f"{name} is not an original: it has lost LayerNorms")
    for size in ("vocab_size", "n_layer", "n_head", "n_embd"):
        if getattr(with_ln.config, size) != getattr(model.config, size):
            raise UserError(f"{name} is no original of {source}: it has another {size}")
    return model if model.config.folded else model.fold(), with_ln


def what_is_read(model, tokenizer, ids, at):
    """--of -> (reader, row, a description), or ((layer, head, query, key), None, a description). UserError."""
    score = re.fullmatch(r"(h\.\d+ head \d+): *(\d+) *-> *(\d+)", of)
    try:
        if score:
            _, layer, head = parse(model, score[1])
            query, key = int(score[2]), int(score[3])
            if not 0 <= key <= query < len(ids):
                raise ValueError(f"a query looks back: {query} -> {key} is not within the prompt's {len(ids)} tokens")
            return (layer, head, query, key), None, f"attention score of {of}"
        if of and not of.startswith("logit:"):
            kind, layer, number = parse(model, of)
            if kind == "head":
                raise ValueError("of a head there are scores: give positions, as h.9 head 6: 5 -> 3")
            return f"h.{layer} neurons", number, f"value of {of} at {tokenizer.decode([ids[at].item()])!r}"
    except ValueError as e:
        raise UserError(f"--of={of}: {e}; or give a logit, as 'logit: Paris'") from None
    if of:
        found = tokenizer.encode(of.removeprefix("logit:")).tolist()
        if len(found) != 1:
            raise UserError(f"--of={of!r} must be one token after the colon, but is {len(found)}")
        target = found[0]
    else:
        target = model(ids[None])[0][0, at, : tokenizer.vocab_size].argmax().item()
    return "logits", target, f"logit of {tokenizer.decode([target])!r}"


def main():
    source = take_source("python -m tools.lens OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(top=1, position=-1))
    directory = model_directory(source)
    free, with_ln = open_models(source, directory)
    tokenizer = tokenizer_of(free, directory)
    ids = torch.tensor(tokenizer.encode(prompt).astype("int64"))
    most = min(free.config.block_size, with_ln.config.block_size)
    if not 0 < len(ids) <= most:
        raise UserError(f"--prompt has {len(ids)} tokens, but must have 1 to {most}")
    if position >= len(ids):
        raise UserError(f"--position={position} is beyond the prompt's {len(ids)} tokens")
    at = position if position >= 0 else len(ids) - 1
    path = out or (os.path.join(source, "lens.png") if os.path.isdir(source) else "lens.png")
    check_picture(path)

    reader, row, what = what_is_read(free, tokenizer, ids, at)
    if row is None:
        found, old = (attribute_score(model, ids, *reader) for model in (free, with_ln))
    else:
        found, old = (attribute(model, ids, reader, row, at) for model in (free, with_ln))
    seen = tokenizer.decode(ids[: at + 1].tolist())
    print(f"the {what} after {seen!r}\n")
    show("score" if row is None else what.split()[0], found, old)
    if reader == "logits":
        show_layers(*(logit_lens(model, ids, at, row) for model in (free, with_ln)), tokenizer)
    print()
    last_words = textwrap.shorten(seen[::-1], 60, placeholder="...")[::-1]
    draw(found[0], old[0], path, f"{what} after {last_words!a}")  # any font has ASCII
    say_next(command("tools.export", source, "--to=hf"))


if __name__ == "__main__":
    main()
