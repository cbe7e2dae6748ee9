"""
GPT-2, with LayerNorms (LN) that can be switched off one at a time, and folded away at the end.

How an LN is removed, in reading order:
  LayerNorm.forward   divides by the token's own std (mode `real`) or by a constant (mode `fake`)
  GPT.observe_std     measures on a batch what the constants should be
  GPT.set_ln_mode     switches one site from real to fake
  GPT.fold            multiplies what is left, an affine map, into the next matrix: a GPT without LN

A site is one LN on one path: `ln_1qk` and `ln_1v` (attention's query-and-key input, and its value
input), `ln_2` (the MLP's input), one of each in a block, and `ln_f` once. GPT-2 small has 37.

This file needs torch alone, and works when it is copied alone; reading and writing model
directories is parts/hub.py's.

Sources: GPT-2 (Radford et al. 2019) in the shape of transformers' GPT2LMHeadModel; the removal is
Heimersheim's, arXiv 2409.13710.
"""
import math
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KINDS = ("ln_1qk", "ln_1v", "ln_2")  # the sites of a block
LOSS_ROWS = 1024  # tokens whose logits exist at one time in training
EVAL_ROWS = 128  # the same for the exact logits of an evaluation: glibc maps anew each time what is beyond 32 MB
# With CUDA each piece costs kernel launches, and a gradient of the size of the whole unembedding: so
# pieces there are this many times as large.
GPU_FACTOR = 8
PLAIN_EPS = 1e4  # from this layer_norm_epsilon on, a plain GPT-2 is taken for LN-free


@dataclass
class GPTConfig:
    block_size: int = 1024  # most positions the model can see
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in LayerNorms and linear maps, as GPT-2 has
    eot: int = 50256  # id of the end-of-text token
    ln_eps: float = 1e-5
    folded: bool = False  # no LN at all: made by GPT.fold


def at_least_float32(x):
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def std_of(x, eps):
    """x (..., C) -> (..., 1): what LayerNorm divides by, sqrt(var + eps) over C, unbiased=False."""
    return torch.sqrt(at_least_float32(x).var(-1, unbiased=False, keepdim=True) + eps)


class LayerNorm(nn.Module):
    """One site. x (B, T, C) -> (B, T, C).

    real: (x - mean) / sqrt(var + eps) * weight + bias
    fake: (x - mean) / constant        * weight + bias, which is affine in x

    Centring stays in both: it is linear, so fold can multiply it into the next matrix. The constant
    is bos_std where use_bos, broadcast to (B, T, 1), is true, and avg_std elsewhere; "bos", as in the
    paper, is position 0, whatever its token (why: "The treatments" in GPT.__init__). Both are 1 until
    they are measured.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.ln_eps
        # Tensors, and the mode too: a compiled graph reads them at each step. A Python flag would
        # be built into it, and each of some 40 removal events would compile the model again.
        # GPT.ln_state saves them; the state dict stays that of a plain GPT-2.
        self.register_buffer("fake", torch.tensor(False), persistent=False)
        self.register_buffer("avg_std", torch.tensor(1.0), persistent=False)
        self.register_buffer("bos_std", torch.tensor(1.0), persistent=False)
        self.ln_mode = "real"

    @property
    def ln_mode(self):
        """The mode, "real" or "fake". ValueError when set to something else."""
        return self._ln_mode

    @ln_mode.setter
    def ln_mode(self, mode):
        if mode not in ("real", "fake"):
            raise ValueError(f"unknown ln_mode {mode!r}: it is 'real' or 'fake'")
        self._ln_mode = mode
        self.fake.fill_(mode == "fake")

    def forward(self, x, use_bos):
        if torch.compiler.is_compiling():  # one graph for both modes
            std = torch.where(self.fake, self.constant(use_bos), std_of(x, self.eps))
        elif self.ln_mode == "fake":
            std = self.constant(use_bos)
        else:  # the same as below with std_of(x), in one kernel
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x32 = at_least_float32(x)  # as F.layer_norm computes, under autocast too
        y = (x32 - x32.mean(-1, keepdim=True)) / std * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(torch.promote_types(x.dtype, self.weight.dtype))

    def constant(self, use_bos):
        return torch.where(use_bos, self.bos_std, self.avg_std)


class KeyValueCache:
    """One block's keys and values of the tokens so far. With it, the next token is computed alone."""

    def __init__(self):
        self.k = self.v = None

    def extend(self, k, v):
        """New keys and values (B, heads, T, C / heads) -> all so far, with these at the end."""
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v


class CausalSelfAttention(nn.Module):
    """x_qk and x_v (B, T, C), the inputs of query and key and of value -> (B, T, C).

    mask, bool and broadcast to (B, heads, T, T), is true where a query sees a key; None: it sees
    itself and what is before it. With a cache, the first tokens may be many; those that follow come
    one at a time."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias or config.folded)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x_qk, x_v, mask=None, cache=None):
        B, T, C = x_qk.shape
        q, k, v = self.query_key_value(x_qk, x_v)  # (B, T, C) each
        shape = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C / heads)
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = mask is None and k.shape[2] == T  # a single token behind a cache sees all of it
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def query_key_value(self, x_qk, x_v):
        C = x_qk.shape[-1]
        if x_qk is x_v:
            return self.c_attn(x_qk).split(C, dim=2)
        # Each path multiplies its own rows of c_attn, so that no product is thrown away.
        W, b = self.c_attn.weight, self.c_attn.bias
        b_qk, b_v = (None, None) if b is None else (b[: 2 * C], b[2 * C :])
        q, k = F.linear(x_qk, W[: 2 * C], b_qk).split(C, dim=2)
        v = F.linear(x_v, W[2 * C :], b_v)
        return q, k, v


class MLP(nn.Module):
    """x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias or config.folded)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # gelu_new, GPT-2's own; nanoGPT's exact GELU is another function
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """x (B, T, C), use_bos (1 or B, T, 1), use_bos_v (B, T, 1) -> (B, T, C). mask and cache as
    CausalSelfAttention's."""

    def __init__(self, config):
        super().__init__()
        self.folded = config.folded
        if not config.folded:
            self.ln_1qk = LayerNorm(config)
            self.ln_1v = LayerNorm(config)
            self.ln_2 = LayerNorm(config)
            # GPT-2's ln_1 as two sites, so that the attention pattern and what it moves can lose
            # their LN at different steps.
            self.ln_1v.weight, self.ln_1v.bias = self.ln_1qk.weight, self.ln_1qk.bias
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    @property
    def ln_mode(self):
        """{"ln_1qk": "real" or "fake", "ln_1v": ..., "ln_2": ...}, to read; GPT.set_ln_mode sets
        it. Empty when folded."""
        return MappingProxyType({} if self.folded else {kind: getattr(self, kind).ln_mode for kind in KINDS})

    def forward(self, x, use_bos, use_bos_v, mask=None, cache=None):
        if self.folded:
            x = x + self.attn(x, x, mask, cache)
            return x + self.mlp(x)
        x = x + self.attn(self.ln_1qk(x, use_bos), self.ln_1v(x, use_bos_v), mask, cache)
        return x + self.mlp(self.ln_2(x, use_bos))


def piece_loss(x, W, b, targets, share, x_teacher, W_teacher, kl_share, dtype, with_gradient):
    """One piece of LossInPieces, which has the arguments' shapes -> the cross-entropy and KL(teacher || model), each
    the sum over rows of share times nats; and the gradients of (1 - kl_share) ce + kl_share kl by x, W, b, or None.

    With p and q the distributions of model and teacher, and t the target as a distribution, the gradient by a row's
    logits is share (p - (1 - kl_share) t - kl_share q). Written by hand: who changes a loss changes it here too."""
    V = len(W)

    def logits_of(x, W, b):
        w = pad_rows(centred(W, dtype))
        logits = F.linear(x.to(dtype), w, None if b is None else pad_rows(centred(b, dtype)))
        return at_least_float32(logits[:, :V]), w

    logits, w = logits_of(x, W, b)
    log_p = logits.log_softmax(-1)
    at = targets.clamp(min=0).unsqueeze(-1)  # (rows, 1)
    ce = -(log_p.gather(-1, at) * share).sum()
    kl = torch.zeros_like(ce)
    if x_teacher is not None:
        log_q = logits_of(x_teacher, W_teacher, None)[0].log_softmax(-1)
        q = log_q.exp()
        kl = ((q * (log_q - log_p)).sum(-1, keepdim=True) * share).sum()
    if not with_gradient:
        return ce, kl, None, None, None
    hit = (at == torch.arange(V, device=x.device)).to(log_p.dtype)  # the target, as a distribution: (rows, V)
    gradient = log_p.exp() - (1 - kl_share) * hit
    if x_teacher is not None:
        gradient = gradient - kl_share * q
    gradient = F.pad((gradient * share).to(dtype), (0, len(w) - V))
    grad_x, grad_W = gradient @ w, (gradient.T @ x.to(dtype))[:V]
    grad_b = None if b is None else gradient[:, :V].sum(0).to(b.dtype)
    return ce, kl, grad_x.to(x.dtype), grad_W.to(W.dtype), grad_b


def centred(W, dtype):
    """W (V, C) or (V,) less its mean over V, in dtype: so much smaller logits with the same softmax. GPT-2's lie
    near -100, where bfloat16's steps of 0.5 would be a noise in KL as large as KL."""
    return W if W.dtype == dtype else (W - W.mean(0)).to(dtype)


def pad_rows(W):
    """W (V, ...) with rows of zeros up to a multiple of 64: 50,304 columns are computed sooner than 50,257."""
    return F.pad(W, (0, 0) * (W.dim() - 1) + (0, -len(W) % 64))


class LossInPieces(torch.autograd.Function):
    """The unembedding and the loss of its logits in one: see GPT.losses_in_pieces.

    Logits are far larger than what they are made of: GPT-2 has 50,257 a token. So each piece of them
    becomes its part of the loss and of the gradient, and is gone before the next is made. The idea is
    Liger Kernel's (arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx, x, W, b, targets, x_teacher, W_teacher, kl_share, piece_loss, with_gradient):
        """x and x_teacher (N, C), W and W_teacher (V, C), b (V,), targets (N,), of which -1 doesn't count; b and
        what is the teacher's may be None. piece_loss: the function above, or compiled; with_gradient: whether
        backward will be called -> loss, ce, kl, scalars, the last two without gradient. The matrix products are
        in autocast's dtype."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        counted = (targets != -1).unsqueeze(-1)
        share = counted / counted.sum().to(W.dtype)  # of each token in the mean, (N, 1)
        ce = kl = 0
        grad_x, grad_W, grad_b = [], None, None
        rows = piece_rows(x, LOSS_ROWS)
        for i in range(0, len(x), rows):
            piece = slice(i, i + rows)
            read = None if x_teacher is None else x_teacher[piece]
            piece_ce, piece_kl, by_x, by_W, by_b = piece_loss(
                x[piece], W, b, targets[piece], share[piece], read, W_teacher, kl_share, dtype, with_gradient)
            ce, kl = ce + piece_ce, kl + piece_kl
            grad_x.append(by_x)
            grad_W = by_W if grad_W is None else grad_W.add_(by_W)
            grad_b = by_b if grad_b is None else grad_b.add_(by_b)
        if with_gradient:
            ctx.save_for_backward(torch.cat(grad_x), grad_W, grad_b)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - kl_share) * ce + kl_share * kl, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_loss, *_):
        grads = (None if grad is None else grad.mul_(by_loss) for grad in ctx.saved_tensors)  # in place: once only
        return *grads, *[None] * 6


class GPT(nn.Module):
    """GPT-2, whole or folded. Beside its weights it has what ln_state saves, the sites' modes and constants and the
    two treatments; and two ways to compute the same: gradient_checkpointing, and piece_loss, compiled or not."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block's activations in the backward pass
        self.piece_loss = piece_loss
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
        ))
        if not config.folded:
            self.transformer.ln_f = LayerNorm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.folded)
        # The treatments. GPT-2 rests its attention on position 0, and makes its residual vector far
        # larger than any other: one constant for both would be wrong for either. While `bos` is on,
        # position 0 has a constant of its own at every site. An end-of-text token begins a document
        # as position 0 does, and the value path treats it alike: while `eot` is on, it takes position
        # 0's constant there. At the end both are switched off, one after the other, so that each site
        # has one scalar left and can be folded.
        self.register_buffer("bos_on", torch.tensor(False), persistent=False)
        self.register_buffer("eot_on", torch.tensor(False), persistent=False)

        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 paper, section 2.3: residual projections scaled by depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if not config.folded:
            self.lm_head.weight = self.transformer.wte.weight  # tied

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, loss_only=False, with_spread=False, teacher=None):
        """idx, targets (B, T) -> logits (B, T, vocab), loss: mean nats per token, or None without
        targets. Targets of -1 don't count.

        With loss_only the logits are None: they exist piece by piece alone, see LossInPieces. With
        with_spread or a teacher a third value follows, a dict: "spread", std_spread of the residual stream
        before ln_f; "ce" and "kl", of which the loss is then a mixture: see losses_in_pieces. ValueError if T
        is beyond block_size, or a teacher is given without loss_only."""
        if teacher is not None and not loss_only:
            raise ValueError("a teacher's KL is part of the loss in pieces: give loss_only=True too")
        x, use_bos = self.run_blocks(idx)
        more = {"spread": self.std_spread(x, idx)} if with_spread else {}
        x = self.final_norm(x, use_bos)
        logits = loss = None
        if loss_only:
            loss, ce, kl = self.losses_in_pieces(x, targets, teacher)
            if teacher is not None:
                more |= {"ce": ce, "kl": kl}
        else:
            logits = self.lm_head(x)
            if targets is not None:
                loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits, loss, more) if more else (logits, loss)

    def compiled(self):
        """What to call in training: torch.compile of this model, in two graphs, the blocks and a piece of the loss.
        In one graph all pieces would be in memory at one time."""
        self.piece_loss = torch.compile(self.piece_loss)
        self.losses_in_pieces = torch.compiler.disable(self.losses_in_pieces)
        return torch.compile(self)

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> what the unembedding reads, (B, T, C). pos (B, T): the tokens' positions,
        if not 0, 1, ...; mask: which of them each one sees, if not all before it; cache: a
        KeyValueCache for each block."""
        return self.final_norm(*self.run_blocks(idx, pos, mask, cache))

    def run_blocks(self, idx, pos=None, mask=None, cache=None):
        """Arguments as hidden's -> the residual stream after the last block, (B, T, C), and which
        tokens take bos_std in ln_f, (1 or B, T, 1)."""
        if pos is None:
            T = idx.shape[1]
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than the model's {self.config.block_size} positions")
            pos = torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T)
        # which tokens take bos_std: (1 or B, T, 1), and on the value path (B, T, 1)
        use_bos = (pos == 0).unsqueeze(-1) & self.bos_on
        use_bos_v = use_bos | ((idx == self.config.eot).unsqueeze(-1) & self.eot_on)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_bos, use_bos_v, mask, use_reentrant=False)
            else:
                x = block(x, use_bos, use_bos_v, mask, None if cache is None else cache[i])
        return x, use_bos

    def final_norm(self, x, use_bos):
        """The residual stream x (B, T, C) after the last block, use_bos (1 or B, T, 1) -> what the unembedding
        reads, (B, T, C): ln_f's output, or x itself when folded."""
        return x if self.config.folded else self.transformer.ln_f(x, use_bos)

    # --------------------------------------------------------------------------------------------
    # losses

    def losses_in_pieces(self, x, targets, teacher=None):
        """x (B, T, C), targets (B, T) -> the loss; and for the log, without gradient, the mean cross-entropy and
        the mean KL(teacher || model); all in nats per token.

        teacher: what another model's unembedding reads (B, T, C), its weight (vocab, C), no bias, and the KL's
        share of the loss, of which the rest is the cross-entropy. Without one the loss is the cross-entropy, and
        KL 0."""
        x_teacher, W_teacher, kl_share = teacher or (None, None, 0.0)
        if x_teacher is not None:
            x_teacher = x_teacher.flatten(0, 1)
        x, targets, head = x.flatten(0, 1), targets.flatten(), self.lm_head
        told = x_teacher, W_teacher, kl_share
        return LossInPieces.apply(
            x, head.weight, head.bias, targets, *told, self.piece_loss, torch.is_grad_enabled())

    def exact_logits(self, x):
        """x (..., C) -> logits (..., vocab) in float32, under autocast too. GPT-2's lie far from zero,
        where bfloat16's steps are wider than what an evaluation looks for."""
        bias = None if self.lm_head.bias is None else self.lm_head.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.lm_head.weight.float(), bias)

    def token_losses(self, x, targets):
        """x (N, C), targets (N,) -> each token's loss in nats (N,), float32."""
        losses = []
        for x_piece, targets_piece in zip(pieces(x, EVAL_ROWS), pieces(targets, EVAL_ROWS)):
            losses.append(F.cross_entropy(self.exact_logits(x_piece), targets_piece, reduction="none"))
        return torch.cat(losses)

    def std_spread(self, x, idx):
        """x (B, T, C), idx (B, T) -> the mean squared difference between the std at each position
        and its mean over ordinary tokens, a scalar: the auxiliary loss of arXiv 2507.02559, which
        keeps the std before ln_f near to what its constant will be. The mean is a target: no gradient
        goes through it."""
        std = std_of(x, self.config.ln_eps).squeeze(-1)  # (B, T)
        ordinary = self.ordinary(idx)
        target = (std * ordinary).sum() / ordinary.sum()
        return (std - target.detach()).square().mean()

    # --------------------------------------------------------------------------------------------
    # removing LayerNorm

    def sites(self):
        """{"h.0.ln_1qk": LayerNorm, ..., "ln_f": LayerNorm}; empty when folded."""
        if self.config.folded:
            return {}
        sites = {}
        for i, block in enumerate(self.transformer.h):
            for kind in KINDS:
                sites[f"h.{i}.{kind}"] = getattr(block, kind)
        sites["ln_f"] = self.transformer.ln_f
        return sites

    def ln_modes(self):
        """{"h.0.ln_1qk": "real" or "fake", ..., "ln_f": ...}; empty when folded."""
        return {name: site.ln_mode for name, site in self.sites().items()}

    def set_ln_mode(self, kind, layer, mode):
        """Switch the site (kind, layer) to mode "real" or "fake"; layer is None for ln_f.
        ValueError: no such site or mode."""
        name = kind if layer is None else f"h.{layer}.{kind}"
        if name not in self.sites():
            raise ValueError(f"no LayerNorm site {name!r} in this model of {self.config.n_layer} layers")
        self.sites()[name].ln_mode = mode

    def set_treatment(self, kind, on):
        """Switch the "bos" or the "eot" treatment on or off. ValueError: no such treatment."""
        if kind not in ("bos", "eot"):
            raise ValueError(f"unknown treatment {kind!r}: it is 'bos' or 'eot'")
        treatment = self.bos_on if kind == "bos" else self.eot_on
        treatment.fill_(on)

    def ordinary(self, idx):
        """Which tokens are neither at position 0 nor end-of-text, (B, T)."""
        return (idx != self.config.eot) & (torch.arange(idx.shape[1], device=idx.device) > 0)

    @torch.no_grad()
    def observe_std(self, idx, over="ordinary"):
        """idx (B, T) -> {site: tensor [avg std, bos std]} of the sites that are still real: the std
        of what they read, its mean over ordinary tokens, or with over="all" over all of them, and its
        mean over position 0. ValueError if there is no such token."""
        averaged = self.ordinary(idx) if over == "ordinary" else torch.ones_like(idx, dtype=torch.bool)
        if not averaged.any():
            raise ValueError("measuring needs an ordinary token: one after position 0 that is not end-of-text")
        observed, hooks = {}, []
        for name, site in self.sites().items():
            if site.ln_mode == "fake":
                continue

            def observe(site, args, name=name):
                std = std_of(args[0], site.eps).squeeze(-1)  # (B, T)
                observed[name] = torch.stack([std[averaged].mean(), std[:, 0].mean()])

            hooks.append(site.register_forward_pre_hook(observe))
        try:
            self.hidden(idx)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: observed[name] for name in self.sites() if name in observed}

    def set_std(self, stds):
        """Set the constants of the sites in {site: (avg std, bos std)}."""
        for name, (avg_std, bos_std) in stds.items():
            self.sites()[name].avg_std.fill_(avg_std)
            self.sites()[name].bos_std.fill_(bos_std)

    def measure_std(self, idx):
        """Set the constants of all sites that are still real from the batch idx (B, T), as
        observe_std finds them over ordinary tokens. ValueError as there. For training, see schedule.measure."""
        self.set_std(self.observe_std(idx))

    def why_not_ln_free(self):
        """The reasons why the model is not LN-free, one for each site or treatment; empty if it is."""
        reasons = [f"{name} is still real" for name, mode in self.ln_modes().items() if mode == "real"]
        for kind, on in (("bos", self.bos_on), ("eot", self.eot_on)):
            if on:
                reasons.append(f"the {kind} treatment is still on")
        return reasons

    def ln_free(self):
        """True if all sites are fake and both treatments off, or the model is folded."""
        return not self.why_not_ln_free()

    @torch.no_grad()
    def fold(self):
        """A new GPT, without any LN, that computes the same function. ValueError if the model is
        not LN-free, or folded already.

        With P = I - ones ones^T / C for the centring, a fake site and the linear map W, b that reads
        it are one affine map:
        W (P x / std * weight + bias) + b  =  (W diag(weight / std) P) x  +  (W bias + b)
        """
        if self.config.folded:
            raise ValueError("can't fold: the model is folded already")
        if not self.ln_free():
            raise ValueError("can't fold: " + self.why_not_ln_free()[0])

        def absorb(site, W, b):
            W = W.double()
            A = W * (site.weight.double() / site.avg_std.double())
            A = A - A.mean(1, keepdim=True)  # times P
            if b is None:
                b = W.new_zeros(len(W))
            if site.bias is not None:
                b = b.double() + W @ site.bias.double()
            return A, b

        new = GPT(replace(self.config, folded=True)).to(self.lm_head.weight)  # its dtype and device
        new.train(self.training)
        state = {name: p for name, p in self.state_dict().items() if ".ln_" not in name}
        C = self.config.n_embd
        for i, block in enumerate(self.transformer.h):
            W, b = block.attn.c_attn.weight, block.attn.c_attn.bias
            b_qk, b_v = (None, None) if b is None else (b[: 2 * C], b[2 * C :])
            W_qk, b_qk = absorb(block.ln_1qk, W[: 2 * C], b_qk)
            W_v, b_v = absorb(block.ln_1v, W[2 * C :], b_v)
            state[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([W_qk, W_v])
            state[f"transformer.h.{i}.attn.c_attn.bias"] = torch.cat([b_qk, b_v])
            W, b = absorb(block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
            state[f"transformer.h.{i}.mlp.c_fc.weight"] = W
            state[f"transformer.h.{i}.mlp.c_fc.bias"] = b
        state["lm_head.weight"], state["lm_head.bias"] = absorb(self.transformer.ln_f, self.lm_head.weight, None)
        new.load_state_dict(state)
        return new

    def ln_state(self):
        """Modes, constants and treatments as plain data, for a checkpoint or a config.json."""
        sites = {}
        for name, site in self.sites().items():
            sites[name] = {"mode": site.ln_mode, "avg_std": site.avg_std.item(), "bos_std": site.bos_std.item()}
        return {"sites": sites, "bos": self.bos_on.item(), "eot": self.eot_on.item()}

    def load_ln_state(self, state):
        """Set what ln_state returned."""
        for name, site in self.sites().items():
            saved = state["sites"][name]
            site.ln_mode = saved["mode"]
            site.avg_std.fill_(saved["avg_std"])
            site.bos_std.fill_(saved["bos_std"])
        self.set_treatment("bos", state["bos"])
        self.set_treatment("eot", state["eot"])

    # --------------------------------------------------------------------------------------------
    # names and shapes in the Hugging Face format

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """The GPT in `source`: a Hugging Face directory (a plain GPT-2, what save_pretrained wrote,
        or a published LN-free model, which comes LN-free), or a hub repository such as
        `gpt2-medium` or `ORG/NAME@REVISION`. ValueError, one line, if it can't be read."""
        from parts import hub  # files, network and what is refused there

        directory = hub.fetch(source)
        hf = hub.read_config(directory)
        hub.check_sizes(directory, hf)
        model = cls(config_from_hf(hf, dropout))
        if hf["model_type"] == "gpt2_ln_mode":
            hub.check_ln_state(f"{directory}/config.json", hf.get("ln_state"), model.ln_modes())
        model.load_hf(hf, hub.read_tensors(directory, model.hf_tensors()))
        return model

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors. Only with all sites real this is a plain `gpt2`
        directory: see hf_config."""
        from parts import hub

        hub.write(directory, self.hf_config(), self.hf_tensors())

    def hf_config(self):
        """config.json. With a fake site, or folded, it has a model_type of our own, and an
        activation_function that makes even GPT2LMHeadModel.from_pretrained refuse it: transformers
        must not divide by a std that is gone."""
        c = self.config
        hf = dict(
            model_type="gpt2",
            architectures=["GPT2LMHeadModel"],
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_ctx=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            activation_function="gelu_new",
            layer_norm_epsilon=c.ln_eps,
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            tie_word_embeddings=True,
            bos_token_id=c.eot,
            eos_token_id=c.eot,
        )
        if c.folded:
            hf |= dict(model_type="gpt2_folded", tie_word_embeddings=False)
        elif "fake" in self.ln_modes().values():
            hf |= dict(model_type="gpt2_ln_mode", ln_state=self.ln_state())
        if hf["model_type"] != "gpt2":
            refused = "gelu_new, but not a plain GPT-2: read it with model.py"
            hf |= dict(architectures=["GPT"], activation_function=refused)
        return hf

    def hf_tensors(self):
        """{name in transformers' GPT2LMHeadModel: our parameter, or a view of it}. GPT-2 without
        biases has them there as zeros."""
        tensors = {}
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Linear, nn.Embedding, LayerNorm)) or name.endswith("ln_1v"):
                continue
            if name == "lm_head" and not self.config.folded:
                continue  # tied to wte
            weight = module.weight.detach()
            if isinstance(module, nn.Linear) and name != "lm_head":
                weight = weight.T  # transformers' Conv1D is (in, out)
            name = name.replace("ln_1qk", "ln_1")
            tensors[name + ".weight"] = weight
            if isinstance(module, nn.Embedding):
                continue
            if module.bias is None:
                tensors[name + ".bias"] = weight.new_zeros(len(module.weight))
            else:
                tensors[name + ".bias"] = module.bias.detach()
        return tensors

    @torch.no_grad()
    def load_hf(self, hf, tensors):
        """Take over the tensors of hf_tensors' names, and the modes of a config.json."""
        # A published LN-free model keeps GPT-2's modules: its std is lost in sqrt(var + 1e12), and
        # its LN weights make up for 1e6.
        published = is_published_ln_free(hf)
        for name, p in self.hf_tensors().items():
            if published and ".ln_" in name and name.endswith(".weight"):
                p.copy_(tensors[name].to(p.dtype) / math.sqrt(hf["layer_norm_epsilon"]))
            else:
                p.copy_(tensors[name])
        if published:
            for site in self.sites().values():
                site.ln_mode = "fake"  # by 1, as the weights have been divided
        if hf["model_type"] == "gpt2_ln_mode":
            self.load_ln_state(hf["ln_state"])


def config_from_hf(hf, dropout=0.0):
    """A config.json, as a dict -> GPTConfig."""
    eot = hf.get("eos_token_id")
    return GPTConfig(
        block_size=hf["n_positions"],
        vocab_size=hf["vocab_size"],
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        dropout=dropout,
        eot=eot if type(eot) is int and 0 <= eot < 2**31 else hf["vocab_size"] - 1,
        ln_eps=1e-5 if is_published_ln_free(hf) else eps_of(hf),
        folded=hf["model_type"] == "gpt2_folded",
    )


def is_published_ln_free(hf):
    """True of the config.json of a published LN-free model: the form of apollo-research/gpt2_noLN. Its eps, 1e12 there,
    drowns any variance."""
    return eps_of(hf) >= PLAIN_EPS


def eps_of(hf):
    return 1e-5 if hf.get("layer_norm_epsilon") is None else hf["layer_norm_epsilon"]


def piece_rows(x, rows):
    """How many rows of x a piece has: GPU_FACTOR times as many on a CUDA GPU."""
    return GPU_FACTOR * rows if x.is_cuda else rows


def pieces(x, rows):
    """x (N, ...) -> tensors of piece_rows(x, rows) rows each, the last one of fewer."""
    return x.split(piece_rows(x, rows))
