"""
Text from a model: any source that eval.py takes, with the tokenizer beside it, GPT-2's or bytes. An LN-free model is
folded first.

    python -m tools.sample out/remove_ln_tiny --prompt="def "
    python -m tools.sample gpt2 --prompt="Hello, I am" --temperature=0.7 --top_k=40 --seed=1
"""
import sys
from functools import partial

from parts.errors import begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import torch
from torch import nn

from configurator import configure, take_source
from model import GPT, KeyValueCache
from parts.device import pick_device
from parts.run import model_directory
from parts.tokenizer import tokenizer_of

# -----------------------------------------------------------------------------
prompt = "\n"  # the text begins with it
max_new_tokens = 256  # fewer if the model ends the text
temperature = 0.8  # 0: always the likeliest token
top_k = 200  # draw from this many likeliest tokens; 0: from all
seed = 1337  # seeds the draws
device = "auto"  # cuda, mps or cpu, the first that is there; or one by name
dtype = "float32"  # dtype of the weights: float32 or bfloat16
# -----------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, ids, n, temperature, top_k, generator):
    """Draws n tokens after ids and yields each id. Beyond the model's last position it keeps the last half of them."""
    ids = list(ids)[-model.config.block_size :]
    device = model.lm_head.weight.device
    cache = []
    for _ in range(n):
        if len(ids) > model.config.block_size:
            ids, cache = ids[-(model.config.block_size // 2) :], []
        first = len(ids) - 1 if cache else 0  # the cache has the tokens before the last one
        cache = cache or [KeyValueCache() for _ in model.transformer.h]
        x = model.hidden(torch.tensor([ids[first:]], device=device), cache)
        logits = model.lm_head(x[:, -1:])[0, 0].float()  # (vocab,)
        ids.append(draw(logits, temperature, top_k, generator))
        yield ids[-1]


def draw(logits, temperature, top_k, generator):
    """logits (vocab,) -> a token id; the likeliest if temperature is 0."""
    if temperature == 0:
        return logits.argmax().item()
    values, tokens = logits.topk(min(top_k or len(logits), len(logits)))
    chosen = torch.multinomial(((values - values[0]) / temperature).softmax(-1), 1, generator=generator)
    return tokens[chosen].item()


def use_addmv(model):
    """Multiply a single row, such as a new token, with addmv. On a CPU it reads bfloat16 weights about 1.4 times as
    fast as F.linear (torch 2.13), and reading them is most of a token's time."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(linear_by_addmv, module)


def linear_by_addmv(linear, x):
    if x.numel() != linear.in_features:
        return nn.functional.linear(x, linear.weight, linear.bias)
    row = x.flatten()
    y = linear.weight.mv(row) if linear.bias is None else torch.addmv(linear.bias, linear.weight, row)
    return y.view(*x.shape[:-1], -1)


def main():
    source = take_source("python -m tools.sample OUT_DIR_OR_MODEL --prompt=TEXT")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(max_new_tokens=1), below=dict(seed=2**63),
              choices=dict(dtype=("float32", "bfloat16")))
    where = pick_device(device)
    directory = model_directory(source)
    model = GPT.from_pretrained(directory).eval()
    tokenizer = tokenizer_of(model, directory)
    given = tokenizer.encode(prompt).tolist()
    if model.ln_free() and not model.config.folded:
        model = model.fold()
    model = model.to(where, getattr(torch, dtype))
    if where == "cpu" and dtype == "bfloat16":
        use_addmv(model)

    print(prompt, end="", flush=True)
    drawn, shown, text = [], "", ""
    before = len(tokenizer.decode(given))  # decoded together with the prompt: alone, text may lose a space
    generator = torch.Generator(where).manual_seed(seed)
    for token in generate(model, given or [tokenizer.eot], max_new_tokens, temperature, top_k, generator):
        if token == tokenizer.eot or token >= tokenizer.vocab_size:  # more ids than that are never trained
            break
        drawn.append(token)
        text = tokenizer.decode(given + drawn)[before:]
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter can be several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])


if __name__ == "__main__":
    main()
