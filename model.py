"""
GPT-2 with LayerNorms (LN) that can be switched off one at a time, folded into the next weights, and so removed.

How an LN is removed, in reading order:
  LayerNorm.forward  divides by the token's own std (mode `real`) or by a measured constant (mode `fake`)
  GPT.measure_std    measures the constants on a batch;  GPT.set_ln_mode  switches one site
  GPT.fold           multiplies what is left, an affine map, into the next matrix: a GPT without LN

A site is one LN on one path: `ln_1qk` and `ln_1v` (attention's query-and-key input and its value input: one weight and bias,
two modes), `ln_2` (the MLP's input), one of each per block, and `ln_f` once.

Sources: GPT-2 (Radford et al. 2019) in the shape of transformers' GPT2LMHeadModel; removal: Heimersheim, arXiv 2409.13710.
"""
import json
import math
import os
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save

KINDS = ("ln_1qk", "ln_1v", "ln_2")  # the sites of a block
LOSS_ROWS = 1024  # tokens whose logits exist at one time in train.py; on a GPU 8 times as many


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


class LayerNorm(nn.Module):
    """One site. x (B, T, C) -> (B, T, C).

    real: (x - mean) / sqrt(var + eps) * weight + bias
    fake: (x - mean) / constant        * weight + bias, which is affine in x

    The constant is bos_std where use_bos (broadcast to (B, T, 1)) is true and avg_std elsewhere; both are 1 until measured.
    The variance is over C, unbiased=False. Source: arXiv 2409.13710.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.ln_eps
        self.ln_mode = "real"
        # Tensors, so that a compiled graph reads them and no event recompiles it. Saved by GPT.ln_state, not in the state dict.
        self.register_buffer("is_fake", torch.tensor(False), persistent=False)
        self.register_buffer("avg_std", torch.tensor(1.0), persistent=False)
        self.register_buffer("bos_std", torch.tensor(1.0), persistent=False)

    def std(self, x):
        return torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps)  # (B, T, 1)

    def forward(self, x, use_bos):
        compiling = torch.compiler.is_compiling()
        if not compiling and self.ln_mode == "real":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)  # eager: the fused kernel
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype  # of the result, as F.layer_norm's
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        constant = torch.where(use_bos, self.bos_std, self.avg_std)
        std = torch.where(self.is_fake, constant, self.std(x)) if compiling else constant
        x = (x - x.mean(-1, keepdim=True)) / std * self.weight
        return (x if self.bias is None else x + self.bias).to(dtype)

    def set_mode(self, mode):
        if mode not in ("real", "fake"):
            raise ValueError(f"unknown ln_mode {mode!r}: it is 'real' or 'fake'")
        self.ln_mode = mode
        self.is_fake.fill_(mode == "fake")


class CausalSelfAttention(nn.Module):
    """x_qk, x_v (B, T, C), the inputs of query and key and of value -> (B, T, C). mask, bool and broadcast to (B, heads, T, T), is
    true where a query sees a key; None: causal. cache, a list that is empty at first, keeps keys and values: later tokens come one at
    a time and see all that is in it. ValueError if the heads don't divide C."""

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
        if x_qk is x_v:
            q, k, v = self.c_attn(x_qk).split(C, dim=2)
        else:
            w_qk, w_v = self.c_attn.weight.split([2 * C, C])
            b_qk, b_v = self.c_attn.bias.split([2 * C, C]) if self.c_attn.bias is not None else (None, None)
            q, k = F.linear(x_qk, w_qk, b_qk).split(C, dim=2)
            v = F.linear(x_v, w_v, b_v)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, heads, T, C / heads)
        if cache is not None:
            cache[:] = k, v = [torch.cat(pair, 2) for pair in zip(cache, (k, v))] if cache else [k, v]
        causal = mask is None and k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """x (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias or config.folded)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # gelu_new: GPT-2's own


class Block(nn.Module):
    """x (B, T, C), use_bos (1 or B, T, 1), use_bos_v (B, T, 1), mask and cache as CausalSelfAttention's -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.folded = config.folded
        if not config.folded:
            self.ln_1qk, self.ln_1v, self.ln_2 = (LayerNorm(config) for _ in KINDS)
            self.ln_1v.weight, self.ln_1v.bias = self.ln_1qk.weight, self.ln_1qk.bias  # one LN, two paths
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    @property
    def ln_mode(self):
        """{"ln_1qk": "real" or "fake", "ln_1v": ..., "ln_2": ...}, to read; GPT.set_ln_mode sets it. Empty when folded."""
        return MappingProxyType({} if self.folded else {kind: getattr(self, kind).ln_mode for kind in KINDS})

    def forward(self, x, use_bos, use_bos_v, mask=None, cache=None):
        if self.folded:
            x = x + self.attn(x, x, mask, cache)
            return x + self.mlp(x)
        x = x + self.attn(self.ln_1qk(x, use_bos), self.ln_1v(x, use_bos_v), mask, cache)
        return x + self.mlp(self.ln_2(x, use_bos))


def pieces(x, rows):
    """x (N, ...) -> tensors of so many rows, on a GPU of 8 times as many: there, a piece's launches and its gradient of the whole
    unembedding are what costs."""
    return x.split(rows if x.is_cpu else 8 * rows)


class GPT(nn.Module):
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
        # Treatments: while on, position 0 (bos; every site) and end-of-text tokens (eot; value path only) are divided by bos_std.
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

    def forward(self, idx, targets=None, aux_loss=False, loss_only=False):
        """idx, targets (B, T) -> logits (B, T, vocab), loss: mean nats per token, or None. Targets of -1 don't count.

        In training, and with loss_only, the logits are None: they are made, and made again for a gradient, in pieces of LOSS_ROWS tokens.
        With aux_loss a third value follows, the mean squared difference between the std before ln_f at each position and its
        mean over ordinary tokens (arXiv 2507.02559). ValueError if T is beyond block_size."""
        x, use_bos = self.residual(idx)
        aux = self.std_spread(x, idx) if aux_loss else None
        x = self.normed(x, use_bos)
        if targets is not None and (self.training or loss_only):
            logits, loss = None, self.loss_in_pieces(x, targets)
        else:
            logits = self.lm_head(x)
            loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (logits, loss, aux) if aux_loss else (logits, loss)

    @torch.compiler.disable  # in one graph with the rest, the pieces would all be in memory at one time
    def loss_in_pieces(self, x, targets):
        """x (B, T, C), targets (B, T) -> the mean loss, in nats per token."""
        both = zip(pieces(x.flatten(0, 1), LOSS_ROWS), pieces(targets.flatten(), LOSS_ROWS))
        return sum(checkpoint(self.summed_loss, *piece, use_reentrant=False) for piece in both) / (targets != -1).sum()

    def summed_loss(self, x, targets):
        """x (rows, C), targets (rows,) -> the sum of their losses, in nats."""
        return F.cross_entropy(self.lm_head(x).float(), targets, ignore_index=-1, reduction="sum")

    def token_losses(self, x, targets, rows=128):
        """x (N, C), targets (N,) -> each token's loss in nats (N,), float32. The logits of so many rows exist at a time (pieces):
        with 128 of them GPT-2's stay below the 32 MB from which glibc asks the system for new pages each time."""
        return torch.cat([F.cross_entropy(self.lm_head(a).float(), b, reduction="none") for a, b in zip(pieces(x, rows), pieces(targets, rows))])

    def normed(self, x, use_bos):
        """What residual returns -> what the unembedding reads, (B, T, C)."""
        return x if self.config.folded else self.transformer.ln_f(x, use_bos)

    def std_spread(self, x, idx):
        """x (B, T, C), idx (B, T) -> the auxiliary loss, a scalar."""
        std = torch.sqrt(x.float().var(-1, unbiased=False) + self.config.ln_eps)  # (B, T)
        ordinary = self.ordinary(idx)
        return (std - (std * ordinary).sum() / ordinary.sum()).square().mean()

    def residual(self, idx, pos=None, mask=None, cache=None):
        """idx (B, T) -> the residual stream after the last block, (B, T, C), and where ln_f uses bos_std, (1 or B, T, 1).
        pos (B, T): the tokens' positions, if not 0, 1, ...; mask: which of them each one sees, if not all before it;
        cache: a list for each block, as CausalSelfAttention's."""
        if pos is None:
            T = idx.shape[1]
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens are more than the model's {self.config.block_size} positions")
            pos = torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T)
        use_bos = (pos == 0).unsqueeze(-1) & self.bos_on
        use_bos_v = use_bos | ((idx == self.config.eot).unsqueeze(-1) & self.eot_on)  # (B, T, 1)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_bos, use_bos_v, mask, use_reentrant=False)
            else:
                x = block(x, use_bos, use_bos_v, mask, None if cache is None else cache[i])
        return x, use_bos

    def ordinary(self, idx):
        """Which tokens are neither at position 0 nor end-of-text, (B, T)."""
        return (idx != self.config.eot) & (torch.arange(idx.shape[1], device=idx.device) > 0)

    # ------------------------------------------------------------------------------------------------------------------
    # removing LayerNorm

    def sites(self):
        """{"h.0.ln_1qk": LayerNorm, ..., "ln_f": LayerNorm}; empty when folded."""
        if self.config.folded:
            return {}
        sites = {f"h.{i}.{kind}": getattr(block, kind) for i, block in enumerate(self.transformer.h) for kind in KINDS}
        return sites | {"ln_f": self.transformer.ln_f}

    def ln_modes(self):
        """{"h.0.ln_1qk": "real" or "fake", ..., "ln_f": ...}; empty when folded."""
        return {name: site.ln_mode for name, site in self.sites().items()}

    def set_ln_mode(self, kind, layer, mode):
        """Switch the site (kind, layer) to mode "real" or "fake"; layer is None for ln_f. ValueError: no such site or mode."""
        name = kind if layer is None else f"h.{layer}.{kind}"
        if name not in self.sites():
            raise ValueError(f"no LayerNorm site {name!r} in this model of {self.config.n_layer} layers")
        self.sites()[name].set_mode(mode)

    def set_treatment(self, kind, on):
        """Switch the "bos" or the "eot" treatment on or off. ValueError: no such treatment."""
        if kind not in ("bos", "eot"):
            raise ValueError(f"unknown treatment {kind!r}: it is 'bos' or 'eot'")
        (self.bos_on if kind == "bos" else self.eot_on).fill_(on)

    @torch.no_grad()
    def measure_std(self, idx):
        """Set the constants of all sites that are still real from the batch idx (B, T): bos_std is the mean std at position 0,
        avg_std the mean over ordinary tokens (neither position 0 nor end-of-text). ValueError if there is none."""
        ordinary = self.ordinary(idx)
        if not ordinary.any():
            raise ValueError("measure_std needs an ordinary token: one behind position 0 that is not end-of-text")

        def measure(site, args):
            std = site.std(args[0]).squeeze(-1)  # (B, T)
            site.avg_std.copy_(std[ordinary].mean())
            site.bos_std.copy_(std[:, 0].mean())

        hooks = [site.register_forward_pre_hook(measure) for site in self.sites().values() if site.ln_mode == "real"]
        try:
            self.transformer.ln_f(*self.residual(idx))
        finally:
            for hook in hooks:
                hook.remove()

    def ln_state(self):
        """Modes, constants and treatments as plain data, for a checkpoint or a config.json."""
        sites = {name: {"mode": s.ln_mode, "avg_std": s.avg_std.item(), "bos_std": s.bos_std.item()} for name, s in self.sites().items()}
        return {"sites": sites, "bos": self.bos_on.item(), "eot": self.eot_on.item()}

    def load_ln_state(self, state):
        """Set what ln_state returned. KeyError, TypeError or ValueError if a site is missing or not whole."""
        for name, site in self.sites().items():
            avg_std, bos_std = state["sites"][name]["avg_std"], state["sites"][name]["bos_std"]
            if not (0 < avg_std < math.inf and 0 < bos_std < math.inf):
                raise ValueError(f"{name} has the constants {avg_std} and {bos_std}")
            site.set_mode(state["sites"][name]["mode"])
            site.avg_std.fill_(avg_std)
            site.bos_std.fill_(bos_std)
        self.set_treatment("bos", state["bos"])
        self.set_treatment("eot", state["eot"])

    def ln_free(self):
        """True if all sites are fake and both treatments off, or the model is folded."""
        return all(mode == "fake" for mode in self.ln_modes().values()) and not self.bos_on and not self.eot_on

    @torch.no_grad()
    def fold(self):
        """A new GPT, without any LN, that computes the same function. ValueError while a site is real or a treatment is on.

        With P = I - 11'/C for the centring, a fake site and the linear map W, b behind it are one affine map:
        W (P x / std * weight + bias) + b  =  (W diag(weight / std) P) x  +  (W bias + b)
        """
        for name, mode in self.ln_modes().items():
            if mode == "real":
                raise ValueError(f"can't fold: {name} is still real")
        for kind, on in (("bos", self.bos_on), ("eot", self.eot_on)):
            if on:
                raise ValueError(f"can't fold: the {kind} treatment is still on")
        if self.config.folded:
            raise ValueError("can't fold: the model is folded already")

        def folded(site, W, b):
            W, b = W.double(), 0.0 if b is None else b.double()
            A = W * (site.weight.double() / site.avg_std.double())
            A = A - A.mean(1, keepdim=True)  # times P
            return A, b + (W @ site.bias.double() if site.bias is not None else W.new_zeros(len(W)))

        new = GPT(GPTConfig(**{**vars(self.config), "folded": True})).to(self.lm_head.weight)
        new.train(self.training)
        state = {name: p for name, p in self.state_dict().items() if ".ln_" not in name}
        C, f = self.config.n_embd, self.transformer
        for i, block in enumerate(f.h):
            attn, fc, prefix = block.attn.c_attn, block.mlp.c_fc, f"transformer.h.{i}."
            b_qk, b_v = (None, None) if attn.bias is None else (attn.bias[: 2 * C], attn.bias[2 * C :])
            W_qk, b_qk = folded(block.ln_1qk, attn.weight[: 2 * C], b_qk)
            W_v, b_v = folded(block.ln_1v, attn.weight[2 * C :], b_v)
            state[prefix + "attn.c_attn.weight"], state[prefix + "attn.c_attn.bias"] = torch.cat([W_qk, W_v]), torch.cat([b_qk, b_v])
            state[prefix + "mlp.c_fc.weight"], state[prefix + "mlp.c_fc.bias"] = folded(block.ln_2, fc.weight, fc.bias)
        state["lm_head.weight"], state["lm_head.bias"] = folded(f.ln_f, self.lm_head.weight, None)
        new.load_state_dict(state)
        return new

    # ------------------------------------------------------------------------------------------------------------------
    # the Hugging Face format: config.json and model.safetensors

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors. With all sites real this is a plain `gpt2` directory; otherwise config.json
        has a model_type of our own, and an activation_function that makes even GPT2LMHeadModel.from_pretrained refuse it. OSError."""
        c = self.config
        config = dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size,
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, activation_function="gelu_new", layer_norm_epsilon=c.ln_eps,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=True,
            bos_token_id=c.eot, eos_token_id=c.eot,
        )
        if c.folded:
            config |= dict(model_type="gpt2_folded", tie_word_embeddings=False)
        elif any(mode == "fake" for mode in self.ln_modes().values()):
            config |= dict(model_type="gpt2_ln_mode", ln_state=self.ln_state())
        if config["model_type"] != "gpt2":
            config |= dict(architectures=["GPT"], activation_function="gelu_new, but not a plain GPT-2: read it with model.py")

        tensors = {}
        for name, module in self.hf_modules().items():
            transpose = isinstance(module, nn.Linear) and name != "lm_head"  # transformers' Conv1D is (in, out)
            tensors[name + ".weight"] = (module.weight.T if transpose else module.weight).detach().cpu().contiguous()
            if not isinstance(module, nn.Embedding) and (name != "lm_head" or c.folded):
                bias = module.bias if module.bias is not None else module.weight.new_zeros(len(module.weight))
                tensors[name + ".bias"] = bias.detach().cpu().contiguous()
        os.makedirs(directory, exist_ok=True)
        weights, text = os.path.join(directory, "model.safetensors"), os.path.join(directory, "config.json")
        try:
            for path, content in ((weights, save(tensors, {"format": "pt"})), (text, json.dumps(config, indent=2).encode())):
                with open(path + ".tmp", "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
            os.replace(weights + ".tmp", weights)
            os.replace(text + ".tmp", text)
        except OSError as e:
            raise OSError(f"can't write {directory}: {e.strerror}") from None
        finally:
            for path in (weights + ".tmp", text + ".tmp"):
                if os.path.exists(path):
                    os.remove(path)

    def hf_modules(self):
        """{name in transformers' GPT2LMHeadModel: module with a weight}."""
        modules = {name: m for name, m in self.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, LayerNorm))}
        modules = {name.replace("ln_1qk", "ln_1"): m for name, m in modules.items() if not name.endswith("ln_1v")}
        if not self.config.folded:
            del modules["lm_head"]  # tied to wte
        return modules

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """The GPT in `source`: a Hugging Face directory (a plain GPT-2, what save_pretrained wrote, or a published LN-free
        model, which comes LN-free), or a hub repository such as `gpt2-medium` or `ORG/NAME@REVISION`.
        Raises ValueError or OSError with one line that names the file."""
        directory = fetch(source)
        path = os.path.join(directory, "config.json")
        try:
            with open(path) as f:
                hf = json.load(f)
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not JSON: {e}") from None
        except FileNotFoundError:
            run = f"; a run's model is {source}/model" if os.path.isdir(os.path.join(source, "model")) else ""
            raise FileNotFoundError(f"{source} is not a model directory: it has no config.json{run}") from None
        kind = hf.get("model_type") if isinstance(hf, dict) else None
        if kind not in ("gpt2", "gpt2_ln_mode", "gpt2_folded"):
            raise ValueError(f"{path}: model_type is {kind!r}, but only GPT-2 models can be read")
        keys = dict(block_size="n_positions", vocab_size="vocab_size", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
        for key in keys.values():
            if type(hf.get(key)) is not int or hf[key] < 1:
                raise ValueError(f"{path}: {key} is missing or not a positive integer")
        if kind == "gpt2":  # what transformers can be told to do otherwise
            for key, ours in dict(activation_function="gelu_new", n_inner=4 * hf["n_embd"], scale_attn_weights=True, tie_word_embeddings=True,
                                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False).items():
                if hf.get(key) not in (None, ours):
                    raise ValueError(f"{path}: {key} is {hf[key]!r}, but model.py has {ours!r}")
        eot, eps = hf.get("eos_token_id"), hf.get("layer_norm_epsilon", 1e-5)
        if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
            raise ValueError(f"{path}: layer_norm_epsilon is {eps!r}, not a number from 0 on")
        published = eps > 1  # LN-free: the std is lost in sqrt(var + 1e12), and the weights make up for 1e6
        model = cls(GPTConfig(**{ours: hf[theirs] for ours, theirs in keys.items()}, dropout=dropout, folded=kind == "gpt2_folded",
                              eot=eot if isinstance(eot, int) else hf["vocab_size"] - 1, ln_eps=1e-5 if published else eps))

        path, tensors = read_tensors(directory)
        tensors = {"transformer." + name if name.startswith(("h.", "wte.", "wpe.", "ln_f.")) else name: t for name, t in tensors.items()}
        for name, module in model.hf_modules().items():
            for part, p in module.named_parameters(recurse=False):
                t = tensors.pop(f"{name}.{part}", None)
                if t is None:
                    raise ValueError(f"{path}: the tensor {name}.{part} is missing")
                if isinstance(module, nn.Linear) and part == "weight" and name != "lm_head":
                    t = t.T
                if t.shape != p.shape:
                    raise ValueError(f"{path}: {name}.{part} has shape {tuple(t.shape)}, but config.json makes it {tuple(p.shape)}")
                with torch.no_grad():
                    p.copy_(t / math.sqrt(eps) if published and isinstance(module, LayerNorm) and part == "weight" else t)
        rest = [n for n in tensors if not n.endswith((".attn.bias", ".attn.masked_bias")) and n != "lm_head.weight"]
        if rest:
            raise ValueError(f"{path}: the tensor {rest[0]} is not one of GPT-2's")
        if published:
            for site in model.sites().values():
                site.set_mode("fake")  # the constant stays 1
        if kind == "gpt2_ln_mode":
            try:
                model.load_ln_state(hf["ln_state"])
            except (KeyError, TypeError, ValueError) as e:
                raise ValueError(f"{os.path.join(directory, 'config.json')}: ln_state is not whole: {e!r}") from None
        return model


def fetch(source):
    """A local directory with config.json and weights: source itself, or else the hub repository NAME, ORG/NAME or either with
    @REVISION, from huggingface_hub's cache (HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work). OSError, one line."""
    if os.path.isdir(source):
        return source
    import huggingface_hub as hub  # comes with datasets; a local directory does without
    from huggingface_hub import errors

    repo, _, revision = source.partition("@")
    try:
        directory = os.path.dirname(hub.hf_hub_download(repo, "config.json", revision=revision or None))
        commit = os.path.basename(directory)
        for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
            try:
                path = hub.hf_hub_download(repo, name, revision=commit)
            except errors.RemoteEntryNotFoundError:
                continue
            for shard in shards(path) if name.endswith(".index.json") else ():
                hub.hf_hub_download(repo, shard, revision=commit)
            return directory
        problem = "has it, but without model.safetensors or pytorch_model.bin"
    except errors.HFValidationError:
        problem = "has no repositories of such names"
    except errors.GatedRepoError:
        problem = "wants you to accept its terms there and to log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        problem = "has no such repository; for a private one, set HF_TOKEN or run `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = f"has {repo}, but no revision {revision}"
    except errors.LocalEntryNotFoundError as e:
        problem = (f"can't be asked ({str(e.__cause__ or 'offline').splitlines()[0]}), nor is it in the cache {hub.constants.HF_HUB_CACHE}: "
                   "download it elsewhere and name its directory")
    except errors.EntryNotFoundError as e:
        problem = f"has it, but not the file {os.path.basename(str(e.response.url))}"
    except errors.HfHubHTTPError as e:
        problem = f"answered: {str(e).splitlines()[0]}" + (": set HF_TOKEN or run `hf auth login`" if e.response.status_code == 401 else "")
    raise OSError(f"{source} is not a directory here, and {hub.constants.ENDPOINT} {problem}")


def shards(index):
    """The file names in a model.safetensors.index.json."""
    try:
        with open(index) as f:
            return sorted(set(json.load(f)["weight_map"].values()))
    except (KeyError, AttributeError, json.JSONDecodeError):
        raise OSError(f"{index} is not an index of shards") from None


def read_tensors(directory):
    """(path, {name: tensor}) from model.safetensors, its shards or pytorch_model.bin, the first that is there."""
    path = os.path.join(directory, "model.safetensors")
    paths = [path]
    if not os.path.exists(path) and os.path.exists(path + ".index.json"):
        path += ".index.json"
        paths = [os.path.join(directory, name) for name in shards(path)]
    elif not os.path.exists(path) and os.path.exists(os.path.join(directory, "pytorch_model.bin")):
        path = os.path.join(directory, "pytorch_model.bin")
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch.load raises many kinds
            raise ValueError(f"{path} can't be read, cut short or not plain tensors ({type(e).__name__})") from None
    tensors = {}
    for part in paths:
        try:
            tensors |= load_file(part)
        except FileNotFoundError:
            raise FileNotFoundError(f"{directory} is not a model directory: it has no {os.path.basename(part)}") from None
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{part} can't be read, cut short or not safetensors: {e}") from None
    return path, tensors
