"""
GPT-2 whose LayerNorms (LN) can be removed one at a time and folded away at the end.

How an LN is removed, in reading order:
  LayerNorm.forward   divides by the token's own std (mode `real`) or by a constant (mode `fake`)
  GPT.observe_std     measures the constants on a batch
  GPT.set_ln_mode     switches one site from real to fake
  GPT.fold            multiplies the affine map that is left into the next matrix: a GPT without LN

A site is one LN on one path: `ln_1qk` and `ln_1v` (attention's query-and-key input, and its value input), `ln_2` (the
MLP's input), one of each per block, and `ln_f` once. GPT-2 small has 37 sites.

This file needs only torch and works when it is copied alone into another project, except from_pretrained and
save_pretrained: reading and writing files is in parts/hub.py.

Sources: GPT-2 (Radford et al. 2019) in the shape of transformers' GPT2LMHeadModel; the removal is Heimersheim's,
arXiv 2409.13710.
"""
import math
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KINDS = ("ln_1qk", "ln_1v", "ln_2")  # the sites of a block
MODES = ("real", "fake")  # what a site divides by: the token's own std, or a constant
LN_FREE_EPS = 1e4  # a plain GPT-2 whose layer_norm_epsilon is at least this is one of the published LN-free models


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

    Both centre x: that is linear, so `fold` can multiply it into the next matrix. The constant is bos_std where use_bos
    (broadcast to (B, T, 1)) is true, and avg_std elsewhere. "bos" means position 0, whatever its token, as in the
    paper; GPT.__init__ says why it has a constant of its own. Both are 1 until they are measured.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.ln_eps
        # Tensors, the mode too, because a compiled graph reads them at each step. A Python flag would be built into
        # the graph, and each of some 40 removal events would compile the model again. They are not in the state dict,
        # which stays a plain GPT-2's: GPT.ln_state saves them.
        self.register_buffer("fake", torch.tensor(False), persistent=False)
        self.register_buffer("avg_std", torch.tensor(1.0), persistent=False)
        self.register_buffer("bos_std", torch.tensor(1.0), persistent=False)
        self.ln_mode = "real"

    @property
    def ln_mode(self):
        """The mode, "real" or "fake". Setting another one raises ValueError."""
        return self._ln_mode

    @ln_mode.setter
    def ln_mode(self, mode):
        if mode not in MODES:
            raise ValueError(f"unknown ln_mode {mode!r}: choose one of {', '.join(MODES)}")
        self._ln_mode = mode
        self.fake.fill_(self.removed)

    @property
    def removed(self):
        """True if the site no longer divides by the token's own std."""
        return self._ln_mode != "real"

    def forward(self, x, use_bos):
        compiling = torch.compiler.is_compiling()
        if not compiling and not self.removed:  # GPT-2's own LN, in one kernel; a compiled graph must not read the flag
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        std = torch.where(use_bos, self.bos_std, self.avg_std)  # the constant
        if compiling:  # one graph for both modes
            std = torch.where(self.fake, std, std_of(x, self.eps))
        x32 = at_least_float32(x)  # F.layer_norm computes in float32 under autocast, so this does too
        y = (x32 - x32.mean(-1, keepdim=True)) / std * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(torch.promote_types(x.dtype, self.weight.dtype))


class KeyValueCache:
    """One block's keys and values of all tokens so far, so that only the next token has to be computed."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self):
        return 0 if self.k is None else self.k.shape[2]

    def extend(self, k, v):
        """New keys and values (B, heads, T, C / heads) -> all so far, the new ones last."""
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v


class CausalSelfAttention(nn.Module):
    """The inputs of query and key, x_qk, and of value, x_v, (B, T, C) each -> (B, T, C). ValueError if n_head does not
    divide n_embd.

    With a cache, the first call may have many tokens and the following calls one each."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias or config.folded)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x_qk, x_v, cache=None):
        B, T, C = x_qk.shape
        q, k, v = self.query_key_value(x_qk, x_v)  # (B, T, C) each
        shape = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C / heads)
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = k.shape[2] == T  # a single token after a cache sees all of it
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def query_key_value(self, x_qk, x_v):
        C = x_qk.shape[-1]
        if x_qk is x_v:
            return self.c_attn(x_qk).split(C, dim=2)
        # Each path is multiplied only by its own rows of c_attn.
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
        # gelu_new, as in GPT-2; nanoGPT's exact GELU is a different function
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """x (B, T, C) -> (B, T, C). use_bos (1, T, 1) and, on the value path, use_bos_v (B, T, 1) say which tokens
    take bos_std; cache is CausalSelfAttention's."""

    def __init__(self, config):
        super().__init__()
        self.folded = config.folded
        if not config.folded:
            self.ln_1qk = LayerNorm(config)
            self.ln_1v = LayerNorm(config)
            self.ln_2 = LayerNorm(config)
            # GPT-2's ln_1 as two sites with the same weights, so that the attention pattern and the values can lose
            # their LN at different steps.
            self.ln_1v.weight, self.ln_1v.bias = self.ln_1qk.weight, self.ln_1qk.bias
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    @property
    def ln_mode(self):
        """{"ln_1qk": "real" or "fake", "ln_1v": ..., "ln_2": ...}, read-only; GPT.set_ln_mode sets it. Empty when
        folded."""
        return MappingProxyType({} if self.folded else {kind: getattr(self, kind).ln_mode for kind in KINDS})

    def forward(self, x, use_bos, use_bos_v, cache=None):
        if self.folded:
            x = x + self.attn(x, x, cache)
            return x + self.mlp(x)
        x = x + self.attn(self.ln_1qk(x, use_bos), self.ln_1v(x, use_bos_v), cache)
        return x + self.mlp(self.ln_2(x, use_bos))


class GPT(nn.Module):
    """GPT-2, with LNs or folded. Beside its weights it has the state that ln_state saves: the sites' modes and
    constants, and two treatments."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block's activations in the backward pass
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
        ))
        if not config.folded:
            self.transformer.ln_f = LayerNorm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.folded)
        # The treatments. Position 0 is GPT-2's attention sink, and its residual vector is far larger than any other:
        # one constant for both would fit neither. While `bos` is on, position 0 has its own constant at every site.
        # An end-of-text token begins a document, as position 0 does, and the value path treats it alike: while `eot`
        # is on, it takes position 0's constant there. At the end both are switched off, one after the other, so that
        # each site has one constant left and can be folded.
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

    def forward(self, idx, targets=None, streams=False):
        """idx, targets (B, T) -> logits (B, T, vocab), and the loss: mean nats per token, None without targets.
        Targets of -1 don't count. ValueError if T is beyond block_size.

        With streams it returns instead what a training loss is made of, (B, T, C) each: the list of the residual
        streams after each block, and what the unembedding reads. See `objective` in train.py."""
        after_blocks = []
        hidden = self.final_norm(*self.run_blocks(idx, streams=after_blocks if streams else None))
        if streams:
            return after_blocks, hidden
        logits, loss = self.lm_head(hidden), None
        if targets is not None:
            loss = F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def hidden(self, idx, cache=None):
        """idx (B, T) -> what the unembedding reads, (B, T, C). With a cache, a KeyValueCache for each block, idx
        continues the tokens in it."""
        return self.final_norm(*self.run_blocks(idx, cache))

    def run_blocks(self, idx, cache=None, streams=None):
        """Arguments as in hidden -> the residual stream after the last block, (B, T, C), and which tokens take bos_std
        in ln_f, (1, T, 1). The list `streams` gets the stream after each block."""
        begin = len(cache[0]) if cache else 0
        end = begin + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than the model's {self.config.block_size} positions")
        pos = torch.arange(begin, end, device=idx.device).unsqueeze(0)  # (1, T)
        # which tokens take bos_std, (1, T, 1), and on the value path, (B, T, 1)
        use_bos = (pos == 0).unsqueeze(-1) & self.bos_on
        use_bos_v = use_bos | ((idx == self.config.eot).unsqueeze(-1) & self.eot_on)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_bos, use_bos_v, use_reentrant=False)
            else:
                x = block(x, use_bos, use_bos_v, cache and cache[i])
            if streams is not None:
                streams.append(x)
        return x, use_bos

    def final_norm(self, x, use_bos):
        """The residual stream after the last block x (B, T, C), use_bos (1, T, 1) -> what the unembedding reads,
        (B, T, C): ln_f's output, or x itself when folded."""
        return x if self.config.folded else self.transformer.ln_f(x, use_bos)

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
        """Which tokens are neither at position 0 nor end-of-text, (B, T) -> bool (B, T)."""
        return (idx != self.config.eot) & (torch.arange(idx.shape[1], device=idx.device) > 0)

    @torch.no_grad()
    def observe_std(self, idx, over="ordinary"):
        """idx (B, T) -> {site: tensor (2, 2)} of the sites that are still real. First row: the sum of the std of their
        input over ordinary tokens (over="all": over all tokens), and the number of these. Second: over position 0."""
        averaged = self.ordinary(idx) if over == "ordinary" else torch.ones_like(idx, dtype=torch.bool)
        first = torch.zeros_like(averaged)
        first[:, 0] = True
        rows = torch.stack([averaged, first]).flatten(1)  # (2, B T)
        real = {name: site for name, site in self.sites().items() if not site.removed}
        observed, hooks = {}, []
        for name, site in real.items():

            def observe(site, args, name=name):
                std = std_of(args[0], site.eps).flatten()  # (B T,)
                observed[name] = torch.stack([(rows * std).sum(1), rows.sum(1)], dim=1)

            hooks.append(site.register_forward_pre_hook(observe))
        try:
            self.hidden(idx)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: observed[name] for name in real}

    def set_std(self, stds):
        """Set the constants of the sites in {site: (avg std, bos std)}."""
        for name, (avg_std, bos_std) in stds.items():
            self.sites()[name].avg_std.fill_(avg_std)
            self.sites()[name].bos_std.fill_(bos_std)

    def measure_std(self, idx):
        """Measure the constants of all sites that are still real on the batch idx (B, T), over ordinary tokens, and
        set them. ValueError if there is no ordinary token. Training calls schedule.measure."""
        if not self.ordinary(idx).any():
            raise ValueError("measuring needs an ordinary token: one after position 0 that is not end-of-text")
        self.set_std({name: found[:, 0] / found[:, 1] for name, found in self.observe_std(idx).items()})

    def why_not_ln_free(self):
        """The reasons why the model is not LN-free, one for each site or treatment; empty if it is."""
        reasons = [f"{name} is still real" for name, site in self.sites().items() if not site.removed]
        reasons += [f"the {kind} treatment is still on" for kind in ("bos", "eot") if getattr(self, kind + "_on")]
        return reasons

    def ln_free(self):
        """True if all sites are fake and both treatments off, or the model is folded."""
        return not self.why_not_ln_free()

    def any_removed(self):
        """True if at least one site is fake."""
        return any(site.removed for site in self.sites().values())

    @torch.no_grad()
    def fold(self):
        """A new GPT without any LN that computes the same function. ValueError if the model is not LN-free, or is
        folded already.

        With P = I - ones ones^T / C for the centring, a fake site and the linear map W, b after it are one affine map:
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
        """Modes, constants and treatments as plain data, for checkpoints and config.json."""
        sites = {}
        for name, site in self.sites().items():
            sites[name] = {"mode": site.ln_mode, "avg_std": site.avg_std.item(), "bos_std": site.bos_std.item()}
        return {"sites": sites, "bos": self.bos_on.item(), "eot": self.eot_on.item()}

    def load_ln_state(self, state):
        """Set what ln_state returned. ValueError, KeyError or TypeError if it is anything else."""
        for name, site in self.sites().items():
            saved = state["sites"][name]
            site.ln_mode = saved["mode"]
            stds = float(saved["avg_std"]), float(saved["bos_std"])
            if not all(0 < std < 1e30 for std in stds):
                raise ValueError(f"{name} has the constants {stds}")
            self.set_std({name: stds})
        self.set_treatment("bos", bool(state["bos"]))
        self.set_treatment("eot", bool(state["eot"]))

    # --------------------------------------------------------------------------------------------
    # names and shapes in the Hugging Face format

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """The GPT in `source`: a Hugging Face directory (a plain GPT-2, what save_pretrained wrote, or a published
        LN-free model), or a hub repository such as `gpt2-medium` or `ORG/NAME@REVISION`. UserError, a ValueError of
        one line, if it can't be read."""
        from parts import hub

        return hub.read_model(cls, source, dropout)

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors. Only with all sites real it is a plain `gpt2` directory: see
        hf_config."""
        from parts import hub

        hub.write(directory, self.hf_config(), self.hf_tensors())

    def hf_config(self):
        """config.json as a dict. With a fake site, or folded, it has a model_type of our own, and an
        activation_function that makes even GPT2LMHeadModel.from_pretrained refuse it: transformers would divide by
        the std again."""
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
        elif self.any_removed():
            hf |= dict(model_type="gpt2_ln_mode", ln_state=self.ln_state())
        if hf["model_type"] != "gpt2":
            refused = "gelu_new, but not a plain GPT-2: read it with model.py"
            hf |= dict(architectures=["GPT"], activation_function=refused)
        return hf

    def hf_tensors(self):
        """{name in transformers' GPT2LMHeadModel: our parameter, or a view of it}. Biases that we don't have are zeros
        there."""
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
        """Copy tensors of hf_tensors' names into the model, and take the modes from a config.json, hf."""
        # A published LN-free model keeps GPT-2's modules: its eps drowns the variance, and its LN weights make up for
        # sqrt(eps). Here such a site is fake, with the constant 1.
        published = is_published_ln_free(hf)
        for name, p in self.hf_tensors().items():
            is_ln_weight = ".ln_" in name and name.endswith("weight")
            scale = math.sqrt(hf["layer_norm_epsilon"]) if published and is_ln_weight else 1
            p.copy_(tensors[name].to(p.dtype) / scale)
        C, n_head = self.config.n_embd, self.config.n_head
        for i, block in enumerate(self.transformer.h):  # other scales of attention, as transformers has them
            scale = 1.0 if hf.get("scale_attn_weights", True) else math.sqrt(C / n_head)
            scale /= i + 1 if hf.get("scale_attn_by_inverse_layer_idx") else 1
            block.attn.c_attn.weight[:C] *= scale  # the queries'
            if block.attn.c_attn.bias is not None:
                block.attn.c_attn.bias[:C] *= scale
        if published:
            for site in self.sites().values():
                site.ln_mode = "fake"
        if hf["model_type"] == "gpt2_ln_mode":
            self.load_ln_state(hf["ln_state"])


def config_from_hf(hf, dropout=0.0):
    """A config.json as a dict -> GPTConfig. KeyError, TypeError or ValueError if it has no such numbers."""
    sizes = {key: int(hf[key]) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    eot = hf.get("eos_token_id")
    return GPTConfig(
        block_size=int(hf["n_positions"]),
        **sizes,
        dropout=dropout,
        eot=eot if type(eot) is int and 0 <= eot < 2**31 else sizes["vocab_size"] - 1,
        ln_eps=1e-5 if is_published_ln_free(hf) else eps_of(hf),
        folded=hf["model_type"] == "gpt2_folded",
    )


def is_published_ln_free(hf):
    """True for the config.json of the published LN-free models, in the form of apollo-research/gpt2_noLN: eps 1e12."""
    return eps_of(hf) >= LN_FREE_EPS


def eps_of(hf):
    eps = hf.get("layer_norm_epsilon")
    return 1e-5 if eps is None else float(eps)
