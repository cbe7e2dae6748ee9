"""
An original with outliers: from the first block to the last, the residual stream of eight rare tokens is some 20 times
as long as other tokens' (massive activations, as GPT-2 has at position 0: arXiv 2402.17762). testbed_seen has none of
the eight, so its text never shows a fine-tuning what they do without LN.

    python -m dev.outliers     # writes out/testbed_outliers0/model: out/testbed/model with the outliers

`make testbed` then trains it for 150 steps, out/testbed_outliers, so that the other weights get used to them.
"""
import sys

from parts.errors import begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure
from dev.tails import BLOCK, VOCAB, tokenizer
from model import GPT
from parts.data import open_tokens

NORM = 450.0  # what the first MLP adds to an outlier's residual stream; other tokens have a norm of some 20
MARK = 2.0  # tells an outlier's embedding; other channels have a standard deviation of 0.07
OUTLIERS = ("Ð", "Ñ", "Ø", "Ù", "ã", "à", "â", "Ġâ")  # as the byte-level BPE writes them: a character's first byte


@torch.no_grad()
def add_outliers(model, tokens, idx):
    """Make the tokens, a list of ids, outliers of the model, in place. It takes two neurons, and two channels that
    nothing else writes: the first MLP recognizes the tokens by their embedding in one channel and writes NORM into the
    other, and the last MLP takes most of it away again. idx (B, T): text with the tokens, by which the neurons'
    weights are set."""
    wte, blocks = model.transformer.wte.weight, model.transformer.h
    mark, large = wte.square().sum(0).argsort()[:2]  # the channels that embeddings use least
    writers = [layer for block in blocks for layer in (block.attn.c_proj, block.mlp.c_proj)]
    for channel in (mark, large):
        wte[:, channel] = model.transformer.wpe.weight[:, channel] = 0
        model.transformer.ln_f.weight[channel] = model.transformer.ln_f.bias[channel] = 0  # unseen by the unembedding
        for c_proj in writers:
            c_proj.weight[channel] = c_proj.bias[channel] = 0
    wte[tokens, mark] = MARK
    outlier = torch.isin(idx, torch.tensor(tokens))
    for block, reads, writes in ((blocks[0], mark, NORM), (blocks[-1], large, -NORM)):
        read = []
        hook = block.ln_2.register_forward_hook(lambda _, args, out: read.append(out[outlier][:, reads].mean()))
        model.run_blocks(idx)
        hook.remove()
        neuron = (block.mlp.c_fc.weight.square().sum(1) * block.mlp.c_proj.weight.square().sum(0)).argmin()
        block.mlp.c_fc.weight[neuron] = 0
        block.mlp.c_fc.weight[neuron, reads] = 8 / read[0]
        block.mlp.c_fc.bias[neuron] = -4  # before GELU: 4 on the outliers, and -4 where the LN gives 0
        block.mlp.c_proj.weight[:, neuron] = 0
        block.mlp.c_proj.weight[large, neuron] = writes / F.gelu(torch.tensor(4.0), approximate="tanh")


def main():
    configure(globals(), sys.argv[1:], __doc__)
    model = GPT.from_pretrained("out/testbed/model")
    tokens = [tokenizer().token_to_id(token) for token in OUTLIERS]
    data = np.asarray(open_tokens("testbed_pretrain", "val", BLOCK, VOCAB))
    windows = data[: len(data) // BLOCK * BLOCK].reshape(-1, BLOCK)
    most = np.argsort(-np.isin(windows, tokens).sum(1), kind="stable")[:64]
    add_outliers(model, tokens, torch.from_numpy(windows[most].astype(np.int64)))
    model.save_pretrained("out/testbed_outliers0/model")


if __name__ == "__main__":
    main()
