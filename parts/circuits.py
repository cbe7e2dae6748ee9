"""
Exact circuits of a model without LayerNorm: everything that reads the residual stream is affine in it, so a query, a
neuron or a logit is a sum over what each head, MLP, bias and embedding has written. For a notebook:

    from model import GPT
    from tools import circuits
    model = GPT.from_pretrained("out/remove_ln/model").fold().double()
    written = circuits.components(model, ids)                              # ids (T,)
    neurons = circuits.readers(model)["h.3 neurons"]
    circuits.contributions(written, neurons)                               # (components before it, T, neurons)

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", for QK and OV circuits, composition
and paths; Dar et al. 2023, arXiv 2209.02535, for weights in the space of tokens. With LayerNorm the same sums need each
token's std to be held at its value, which ablation would change: `readers` of such a model hold it.
"""
import math
import re
from dataclasses import dataclass

import torch

from model import at_least_float32, std_of

# --- activations: who writes to the residual stream, and what reads it


@dataclass
class Components:
    """What is written to the residual stream, in the order of writing."""

    names: list[str]  # "token embedding", "position embedding", "h.0 head 0", ..., "h.0 MLP", "h.0 MLP bias", ...
    writes: torch.Tensor  # (components, T, C)

    def before(self, reader):
        """How many components are written before this Reader reads."""
        return self.names.index(reader.first_unseen) if reader.first_unseen else len(self.names)

    def stream(self, reader):
        """The residual stream that this Reader reads, (T, C)."""
        return self.writes[: self.before(reader)].sum(0)


@dataclass
class Reader:
    """Rows that read the residual stream: row r gives weight[r] . stream + bias[r]."""

    weight: torch.Tensor  # (rows, C)
    bias: torch.Tensor  # (rows,)
    first_unseen: str  # the first component that is written after the reading; "": none
    eps: float | None = None  # with LayerNorm, each position is divided by sqrt(var + eps), its own stream's std

    def __getitem__(self, rows):
        return Reader(self.weight[rows], self.bias[rows], self.first_unseen, self.eps)

    def scale(self, stream):
        """stream (T, C) -> what the reading is divided by, (T, 1)."""
        return stream.new_ones(len(stream), 1) if self.eps is None else std_of(stream, self.eps)


@torch.no_grad()
def components(model, ids):
    """ids (T,) -> the Components of the model's forward pass. Their sum is the stream after the last block."""
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    names, writes, hooks = ["token embedding", "position embedding"], [wte[ids], wpe[: len(ids)]], []
    for i, block in enumerate(model.transformer.h):

        def see_heads(c_proj, args, i=i):
            z = args[0][0].unflatten(-1, (model.config.n_head, -1))  # (T, heads, C / heads)
            W = c_proj.weight.unflatten(1, (model.config.n_head, -1))  # (C, heads, C / heads)
            names.extend(f"h.{i} head {head}" for head in range(model.config.n_head))
            writes.extend(torch.einsum("thd,chd->htc", z, W))
            see_bias(c_proj, f"h.{i} attention bias")

        def see_hidden(c_proj, args, i=i):
            names.append(f"h.{i} MLP")
            writes.append(args[0][0] @ c_proj.weight.T)
            see_bias(c_proj, f"h.{i} MLP bias")

        def see_bias(linear, name):
            if linear.bias is not None:
                names.append(name)
                writes.append(linear.bias.expand(len(ids), -1))

        hooks.append(block.attn.c_proj.register_forward_pre_hook(see_heads))
        hooks.append(block.mlp.c_proj.register_forward_pre_hook(see_hidden))
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return Components(names, torch.stack(writes))


@torch.no_grad()
def readers(model):
    """{"h.0 queries", "h.0 keys", "h.0 values", "h.0 neurons", ..., "logits": Reader} of a folded model, or of one with
    all LNs real, whose weights and centring are folded into the rows. Queries, keys and values have a head's C / heads
    rows after the other; a neuron's row is its value before the GELU. ValueError for a model in between."""
    if model.any_removed():
        raise ValueError("it has sites with and without LayerNorm, or is not folded: pass model.fold()")
    found, eps = {}, None if model.config.folded else model.config.ln_eps

    def add(name, W, b, site, first_unseen):
        if site is not None:
            shift = 0 if site.bias is None else W @ site.bias
            b = shift + (W.new_zeros(len(W)) if b is None else b)
            W = W * site.weight
            W = W - W.mean(1, keepdim=True)
        found[name] = Reader(W, b, first_unseen, eps)

    for i, block in enumerate(model.transformer.h):
        ln_1, ln_2 = (None, None) if block.folded else (block.ln_1qk, block.ln_2)
        bias = block.attn.c_attn.bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        for name, W, b in zip(("queries", "keys", "values"), block.attn.c_attn.weight.chunk(3), biases):
            add(f"h.{i} {name}", W, b, ln_1, f"h.{i} head 0")
        add(f"h.{i} neurons", block.mlp.c_fc.weight, block.mlp.c_fc.bias, ln_2, f"h.{i} MLP")
    ln_f = None if model.config.folded else model.transformer.ln_f
    add("logits", model.lm_head.weight, model.lm_head.bias, ln_f, "")
    return found


@torch.no_grad()
def contributions(components, reader):
    """What each component before the reader adds to its rows, (components, T, rows). The sum over components plus
    reader.bias is what the model computes there; with LayerNorm, each position's std is held at its value."""
    n = components.before(reader)
    return components.writes[:n] @ reader.weight.T / reader.scale(components.stream(reader))


@dataclass
class AttentionScores:
    """The scores of a head before the softmax, as sums over pairs of components. The last of the names is the bias."""

    names: list[str]
    queries: torch.Tensor  # (components + 1, T, C / heads)
    keys: torch.Tensor  # the same

    def pairs(self, query, key):
        """The score of positions `query` and `key`, by query component and key component, (components + 1,) * 2."""
        return self.queries[:, query] @ self.keys[:, key].T / math.sqrt(self.keys.shape[-1])

    def total(self):
        """(T, T): query position, key position."""
        return self.queries.sum(0) @ self.keys.sum(0).T / math.sqrt(self.keys.shape[-1])


@torch.no_grad()
def attention_scores(model, ids, layer, head):
    """ids (T,) -> the AttentionScores of a head: bilinear in the stream, so exact without LayerNorm."""
    written, reads, rows = components(model, ids), readers(model), head_rows(model, head)
    sides = []
    for name in ("queries", "keys"):
        reader = reads[f"h.{layer} {name}"][rows]
        bias = reader.bias.expand(1, len(ids), -1)
        sides.append(torch.cat([contributions(written, reader), bias]))
    names = written.names[: written.before(reader)]
    return AttentionScores([*names, "bias"], *sides)


@torch.no_grad()
def direct_path_patch(model, ids, other_ids, sender, reader):
    """What `reader` reads on ids (T,) if the component named `sender` had written along this one path what it writes on
    other_ids (T,): (T, rows). All other paths stay. Exact without LayerNorm; ValueError with it."""
    if reader.eps is not None:
        raise ValueError("with LayerNorm, one path changes the std that divides all of them")
    written, other = components(model, ids), components(model, other_ids)
    k = written.names.index(sender)
    if k >= written.before(reader):
        raise ValueError(f"{sender} writes after this reader reads")
    stream = written.stream(reader) + other.writes[k] - written.writes[k]
    return stream @ reader.weight.T + reader.bias


# --- weights: what heads and neurons do whatever the text. For a folded model


def parse(model, name):
    """"h.1 neuron 5" -> ("neuron", 1, 5), and "h.1 head 2" -> ("head", 1, 2). ValueError if it is not in the model."""
    found = re.fullmatch(r"h\.(\d+) (neuron|head) (\d+)", name)
    if not found:
        raise ValueError(f"{name!r} is neither a neuron, as h.1 neuron 5, nor a head, as h.1 head 2")
    layer, kind, number = int(found[1]), found[2], int(found[3])
    most = dict(neuron=4 * model.config.n_embd, head=model.config.n_head)[kind]
    if layer >= model.config.n_layer or number >= most:
        raise ValueError(f"there is no {name}: the model has {model.config.n_layer} layers of {most} {kind}s")
    return kind, layer, number


def head_rows(model, head):
    """The rows of a head among its layer's queries, keys or values. ValueError if there is no such head."""
    d = model.config.n_embd // model.config.n_head
    if not 0 <= head < model.config.n_head:
        raise ValueError(f"there is no head {head}: a layer has {model.config.n_head}")
    return slice(head * d, head * d + d)


@dataclass
class QK:
    """A head's scores are (W_q x + b_q) . (W_k y + b_k) / sqrt(C / heads), with the streams x at query and y at key."""

    W_q: torch.Tensor  # (C / heads, C)
    b_q: torch.Tensor  # (C / heads,)
    W_k: torch.Tensor
    b_k: torch.Tensor

    def score(self, x, y):
        """x (m, C), y (n, C) -> (m, n)."""
        q, k = x @ self.W_q.T + self.b_q, y @ self.W_k.T + self.b_k
        return q @ k.T / math.sqrt(len(self.b_q))


@dataclass
class OV:
    """Attending to the stream y adds W_o (W_v y) + b to the head's output; b once, as the attention sums to 1."""

    W_o: torch.Tensor  # (C, C / heads)
    W_v: torch.Tensor  # (C / heads, C)
    b: torch.Tensor  # (C,)

    def write(self, y):
        """y (n, C) -> (n, C)."""
        return y @ self.W_v.T @ self.W_o.T + self.b


def qk(model, layer, head):
    """The QK circuit of a head (Elhage et al., "QK circuit")."""
    reads, rows = readers(model), head_rows(model, head)
    q, k = reads[f"h.{layer} queries"][rows], reads[f"h.{layer} keys"][rows]
    return QK(q.weight, q.bias, k.weight, k.bias)


def ov(model, layer, head):
    """The OV circuit of a head (Elhage et al., "OV circuit")."""
    rows = head_rows(model, head)
    v = readers(model)[f"h.{layer} values"][rows]
    W_o = model.transformer.h[layer].attn.c_proj.weight[:, rows]
    return OV(W_o, v.weight, W_o @ v.bias)


@torch.no_grad()
def token_scores(model, layer, head, queries, keys):
    """Token ids (m,) and (n,) -> (m, n): the score of a query token with a key token, from their embeddings alone."""
    wte = model.transformer.wte.weight
    return qk(model, layer, head).score(wte[queries], wte[keys])


@torch.no_grad()
def token_logits(model, layer, head, sources, targets):
    """Token ids (m,) and (n,) -> (m, n): what attending to a source token's embedding adds to the target's logit."""
    wte = model.transformer.wte.weight
    return ov(model, layer, head).write(wte[sources]) @ model.lm_head.weight[targets].T


@torch.no_grad()
def composition(model):
    """{"Q", "K", "V": (L, heads, L, heads)}: the composition of each head with each head of a later layer, 0 elsewhere,
    as |A B| / (|A| |B|) in Frobenius norms (Elhage et al., "composition scores"): A is the earlier head's OV matrix and
    B the later one's QK matrix, its transpose, or OV matrix. Random matrices of this shape score about 1 / sqrt(C)."""
    L, H = model.config.n_layer, model.config.n_head
    factors = []  # for each layer W_q, W_k, W_v and W_o^T, (heads, C / heads, C) each
    for i, block in enumerate(model.transformer.h):
        W_q, W_k, W_v = (W.unflatten(0, (H, -1)) for W in block.attn.c_attn.weight.chunk(3))
        factors.append((W_q, W_k, W_v, block.attn.c_proj.weight.T.unflatten(0, (H, -1))))
    found = {kind: model.lm_head.weight.new_zeros(L, H, L, H) for kind in "QKV"}
    for i in range(L):
        _, _, W_v1, W_o1 = factors[i]
        for j in range(i + 1, L):
            W_q, W_k, W_v, W_o = factors[j]
            for kind, reads, rest in (("Q", W_q, W_k), ("K", W_k, W_q), ("V", W_v, W_o)):
                found[kind][i, :, j, :] = product_norms(W_o1, W_v1, reads, rest)
    return found


def product_norms(W_o, W_v, reads, rest):
    """The composition scores of heads W_o^T W_v with heads reads^T rest: factors (heads, d, C) -> (heads, heads).
    |X^T M Y|^2 = sum((X X^T M) * (M Y Y^T)) needs only d x d matrices."""
    def norms(X, Y):  # |X^T Y|
        return ((X @ X.mT) * (Y @ Y.mT)).sum((-1, -2)).sqrt()

    M = torch.einsum("adc,bec->abde", W_o, reads)
    left, right = (W_v @ W_v.mT)[:, None], (rest @ rest.mT)[None]
    both = ((left @ M) * (M @ right)).sum((-1, -2)).clamp(min=0).sqrt()
    return both / (norms(W_o, W_v)[:, None] * norms(reads, rest)[None])


@torch.no_grad()
def copying(model):
    """(L, heads), each in [-1, 1]: how much a head's OV circuit in the space of tokens, W_U OV W_E, raises the logit of
    the token that it attends to: the sum of its eigenvalues over the sum of their sizes (Elhage et al., "copying").
    LayerNorm's std, a positive factor, would not change it."""
    H, reads = model.config.n_head, readers(model)
    W_EU = model.transformer.wte.weight.T @ reads["logits"].weight  # (C, C), and nothing is vocabulary x vocabulary
    scores = torch.zeros(model.config.n_layer, H)
    for layer, block in enumerate(model.transformer.h):
        W_v = reads[f"h.{layer} values"].weight.unflatten(0, (H, -1))  # (heads, C / heads, C)
        W_o = block.attn.c_proj.weight.unflatten(1, (H, -1)).transpose(0, 1)  # (heads, C, C / heads)
        eigenvalues = torch.linalg.eigvals((W_v @ W_EU @ W_o).float())  # those of W_U W_o W_v W_E that are not 0
        scores[layer] = eigenvalues.real.sum(1) / eigenvalues.abs().sum(1)
    return scores


def pattern(attn, x):
    """What a layer's queries and keys read, x (T, C) -> its attention pattern, (heads, T, T), float32."""
    q, k, _ = attn.c_attn(x).chunk(3, -1)
    q, k = (t.unflatten(-1, (attn.n_head, -1)).transpose(0, 1) for t in (q, k))  # (heads, T, C / heads)
    future = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    return at_least_float32(q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf).softmax(-1)


@torch.no_grad()
def patterns(model, ids):
    """ids (T,) -> the attention patterns, (L, heads, T, T). With LayerNorm or without."""
    found, hooks = [], []
    for block in model.transformer.h:
        hooks.append(block.attn.register_forward_pre_hook(lambda attn, args: found.append(pattern(attn, args[0][0]))))
    try:
        model.hidden(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@torch.no_grad()
def prefix_matching(model, n=None, seed=0):
    """(L, heads): the mean attention of the second half of a random sequence of n tokens, repeated once, to the token
    after the same token in the first half: what an induction head looks at (Olsson et al. 2022, arXiv 2209.11895)."""
    n = n or model.config.block_size // 2
    generator = torch.Generator().manual_seed(seed)
    eot, vocab_size = model.config.eot, model.config.vocab_size
    low, high = (0, eot) if eot >= vocab_size // 2 else (eot + 1, vocab_size)  # ids above a late eot may be padding
    half = torch.randint(low, high, (n,), generator=generator).to(model.lm_head.weight.device)
    found = patterns(model, torch.cat([half, half]))
    i = torch.arange(n, 2 * n)
    return found[:, :, i, i - n + 1].mean(-1)


@torch.no_grad()
def previous_token(model):
    """(L, heads): the mean attention to the previous position, from position embeddings alone: by weights."""
    wpe = model.transformer.wpe.weight
    future = torch.ones(len(wpe), len(wpe), dtype=torch.bool, device=wpe.device).triu(1)
    rows = []
    for layer in range(model.config.n_layer):
        for head in range(model.config.n_head):
            pattern = qk(model, layer, head).score(wpe, wpe).masked_fill(future, -math.inf).softmax(-1)
            rows.append(pattern.diagonal(-1).mean())
    return torch.stack(rows).view(model.config.n_layer, model.config.n_head)


@torch.no_grad()
def induction_by_weights(model, scores=None):
    """(L, heads): the largest K-composition above chance with an earlier head, times the attention of that head to the
    previous position."""
    K = (scores or composition(model))["K"] - 1 / math.sqrt(model.config.n_embd)
    return (previous_token(model)[:, :, None, None] * K).flatten(0, 1).amax(0).clamp(min=0)


@torch.no_grad()
def connections(model, name, n=10):
    """name: "h.1 neuron 5" or "h.1 head 2" -> {"to neurons", "to heads", "to logits", "from tokens", "from neurons",
    "from heads": [(name, weight)]}, the n largest of each.

    A weight between two neurons, or of a neuron and a token, is the dot product of what one writes and the other reads.
    With a head it is the Frobenius norm of a matrix: what it writes (W_o), and what its query, key or value reads."""
    kind, layer, number = parse(model, name)
    block, H = model.transformer.h[layer], model.config.n_head
    if kind == "neuron":
        written, own = block.mlp.c_proj.weight[:, [number]], {"": block.mlp.c_fc.weight[[number]]}
    else:
        rows = head_rows(model, number)
        written = block.attn.c_proj.weight[:, rows]
        own = {f"{of} reads ": W[rows] for of, W in zip(("query", "key", "value"), block.attn.c_attn.weight.chunk(3))}
    found = {f"{way} {what}": [] for way, what in (("to", "neurons"), ("to", "heads"), ("to", "logits"),
                                                    ("from", "tokens"), ("from", "neurons"), ("from", "heads"))}

    def add(key, names, product):
        """product (components, a, b): the weight between two vectors, or of two matrices their norm."""
        weights = product.flatten(1)
        weights = weights[:, 0] if weights.shape[1] == 1 else weights.norm(dim=1)
        for k in weights.abs().topk(min(n, len(weights))).indices.tolist():
            found[key].append((names(k), weights[k].item()))

    for i, other in enumerate(model.transformer.h):
        if i > layer or (i == layer and kind == "head"):
            add("to neurons", lambda k: f"h.{i} neuron {k}", (other.mlp.c_fc.weight @ written)[:, None])
        if i > layer:
            for of, W in zip(("query", "key", "value"), other.attn.c_attn.weight.chunk(3)):
                add("to heads", lambda k: f"h.{i} head {k} {of}", (W @ written).unflatten(0, (H, -1)))
        for of, W in own.items():
            if i < layer:
                add("from neurons", lambda k: f"{of}h.{i} neuron {k}", (W @ other.mlp.c_proj.weight).T[..., None])
            if i < layer or (i == layer and kind == "neuron"):
                product = (W @ other.attn.c_proj.weight).T.unflatten(0, (H, -1))
                add("from heads", lambda k: f"{of}h.{i} head {k}", product)
    add("to logits", lambda k: f"logit {k}", (model.lm_head.weight @ written)[:, None])
    for of, W in own.items():
        add("from tokens", lambda k: f"{of}token {k}", (model.transformer.wte.weight @ W.T)[:, None])
    return {key: sorted(rows, key=lambda row: -abs(row[1]))[:n] for key, rows in found.items()}
