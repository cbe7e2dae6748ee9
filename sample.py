"""
Text from a model: any source that eval.py takes, GPT-2's tokenizer or bytes. An LN-free model is folded first.

    python sample.py out/remove_ln_tiny --prompt="def "
    python sample.py gpt2 --prompt="Hello, I am" --temperature=0.7 --top_k=40 --seed=1
"""
import codecs
import os
import sys
from contextlib import nullcontext

import tiktoken
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configurator import configure, one_line_errors
from data import pick_device
from model import GPT

# -----------------------------------------------------------------------------
prompt = "\n"
max_new_tokens = 256
temperature = 0.8  # 0: always the likeliest token
top_k = 200  # draw from so many likeliest tokens; 0: from all
seed = 1337
device = "auto"  # cuda, mps or cpu, the first that is there
dtype = "float32"  # or bfloat16
# -----------------------------------------------------------------------------


class OneRow(TorchFunctionMode):
    """Within it F.linear of a single row is addmv, which reads bfloat16 weights about 1.4 times as fast on a CPU (torch 2.13)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.linear or args[0].numel() != args[0].shape[-1]:
            return function(*args, **(kwargs or {}))
        x, W, b = args
        y = W.mv(x.flatten()) if b is None else torch.addmv(b, W, x.flatten())
        return y.view(*x.shape[:-1], -1)


@torch.inference_mode()
def generate(model, ids, n, temperature, top_k, generator):
    """Yields n token ids after ids, drawn one by one with a cache of keys and values. Where the positions end, it goes on from the last
    half of them. temperature 0: the likeliest."""
    ids, cache = list(ids)[-model.config.block_size :], []
    W = model.lm_head.weight
    device, one_row = W.device, OneRow() if W.is_cpu and W.dtype == torch.bfloat16 else nullcontext()
    for _ in range(n):
        if not cache or len(ids) > model.config.block_size:
            ids = ids[-(model.config.block_size // 2) :] if cache and len(ids) > model.config.block_size else ids
            cache = [[] for _ in model.transformer.h]
            x, use_bos = model.residual(torch.tensor([ids], device=device), cache=cache)
        else:
            with one_row:
                x, use_bos = model.residual(torch.tensor([ids[-1:]], device=device), torch.tensor([[len(ids) - 1]], device=device), cache=cache)
        with one_row:
            logits = model.lm_head(model.normed(x[:, -1:], use_bos[:, -1:]))[0, 0].float()
        if temperature == 0:
            token = logits.argmax().item()
        else:
            values, which = logits.topk(min(top_k, len(logits)) if top_k else len(logits))
            token = which[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)].item()
        ids.append(token)
        yield token


def main():
    if len(sys.argv) < 2 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("--help", "-h")):
        sys.exit("error: usage: python sample.py OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1 if sys.argv[1] in ("--help", "-h") else 2 :], __doc__)
    if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 <= seed < 2**63:
        sys.exit("error: max_new_tokens must be 1 or more, temperature, top_k and seed 0 or more, seed below 2**63")
    if dtype not in ("float32", "bfloat16"):
        sys.exit(f"error: dtype is {dtype!r}, but it must be float32 or bfloat16")
    source = sys.argv[1]
    with one_line_errors():
        where = pick_device(device)
        run = os.path.join(source, "model")
        model = GPT.from_pretrained(run if os.path.isdir(run) else source).eval()
        eot = model.config.eot
        if eot not in (256, 50256):
            raise ValueError(f"{source} has no tokenizer that is known here: its end-of-text is {eot}, neither GPT-2's 50256 nor 256, that of bytes")
        bpe = tiktoken.get_encoding("gpt2") if eot == 50256 else None
        ids = (bpe.encode_ordinary(prompt) if bpe else list(prompt.encode())) or [eot]
        if model.ln_free() and not model.config.folded:
            model = model.fold().eval()
        model = model.to(where, getattr(torch, dtype))
        generator = torch.Generator(where).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter can reach over several tokens
    print(prompt, end="", flush=True)
    try:
        for token in generate(model, ids, max_new_tokens, temperature, top_k, generator):
            if token >= eot:
                break
            print(decoder.decode(bpe.decode_single_token_bytes(token) if bpe else bytes([token])), end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
