"""
How much the loss of the testbed's model grows when one site is removed, before any training.

    python -m dev.testbed.jumps

For each site: the spread of its std, and the growth of the loss on `testbed_choose` when this site alone is fake. The
constant, from 16 windows of `testbed_tune`, is the mean of the std, its harmonic mean 1 / mean(1/s), or the
least-squares constant mean(s^2) / mean(s); position 0 has its own. "refit" fits the next matrix to its former outputs.
"""
import torch

from model import GPT, std_of
from parts.data import open_tokens, read_windows, val_starts
from parts.loss import token_losses

MODEL = "out/testbed/model"
MEANS = {
    "mean": lambda s: s.mean(),
    "harmonic": lambda s: 1 / (1 / s).mean(),
    "squares": lambda s: s.square().mean() / s.mean(),
}


def windows(dataset, split, n, model):
    """x and y, (n, 256) each, spread evenly over the file."""
    tokens = open_tokens(dataset, split, 256, model.config.vocab_size)
    return read_windows(tokens, val_starts(tokens, n, 256), 256, "cpu")


@torch.no_grad()
def loss_of(model, x, y):
    """Mean nats per token."""
    read = torch.cat([model.hidden(rows) for rows in x.split(16)]).flatten(0, 1)
    return token_losses(model, read, y.flatten()).double().mean().item()


@torch.no_grad()
def inputs_of_sites(model, x):
    """{site: (its input (N, T, C), use_bos)}."""
    inputs = {}
    hooks = [site.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args}))
             for name, site in model.sites().items()]
    model.hidden(x)
    for hook in hooks:
        hook.remove()
    return inputs


def reader_of(model, name):
    """Views of the matrix and bias that read a site in a block."""
    _, layer, kind = name.split(".")
    block, C = model.transformer.h[int(layer)], model.config.n_embd
    linear = block.mlp.c_fc if kind == "ln_2" else block.attn.c_attn
    rows = {"ln_2": slice(0, 4 * C), "ln_1qk": slice(0, 2 * C), "ln_1v": slice(2 * C, 3 * C)}[kind]
    return linear.weight.data[rows], linear.bias.data[rows]


@torch.no_grad()
def refit(W, b, before, after):
    """Change W and b so that W after + b is nearest to the former W before + b: least squares over the rows (N, C) of
    both, with a ridge of 0.01 of the mean square towards the former W and b."""
    before, after = before.double(), after.double()
    z = torch.cat([after, torch.ones_like(after[:, :1])], 1)
    gram = z.T @ z
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram + ridge, z.T @ ((before - after) @ W.T.double()))
    W += change[:-1].T
    b += change[-1]


def main():
    model = GPT.from_pretrained(MODEL).eval()
    model.set_treatment("bos", True)
    batch, _ = windows("testbed_tune", "train", 16, model)
    x, y = windows("testbed_choose", "val", 64, model)
    inputs = inputs_of_sites(model, batch)
    original = loss_of(model, x, y)
    print(f"loss {original:.4f}; spread: standard deviation of the std over ordinary tokens, by its mean\n")
    print(f"{'':<12}{'std':>8}{'spread':>8}" + "".join(f"{how:>10}" for how in [*MEANS, "refit"]))
    found = []
    for name, site in model.sites().items():
        read, use_bos = inputs[name]
        std = std_of(read, site.eps).squeeze(-1)
        ordinary = std[model.ordinary(batch)]
        spread = (ordinary.std() / ordinary.mean()).item()
        before = site(read, use_bos)
        site.ln_mode = "fake"
        jumps = []
        for mean in MEANS.values():
            model.set_std({name: (mean(ordinary), mean(std[:, 0]))})
            jumps.append(loss_of(model, x, y) - original)
        if name != "ln_f":  # its matrix is the embedding too
            model.set_std({name: (ordinary.mean(), std[:, 0].mean())})
            W, b = reader_of(model, name)
            kept = W.clone(), b.clone()
            refit(W, b, before.flatten(0, 1), site(read, use_bos).flatten(0, 1))
            jumps.append(loss_of(model, x, y) - original)
            W.copy_(kept[0])
            b.copy_(kept[1])
        site.ln_mode = "real"
        found.append((spread, jumps[0]))
        print(f"{name:<12}{ordinary.mean():>8.3f}{spread:>8.3f}" + "".join(f"{jump:>+10.4f}" for jump in jumps))
    ranks = torch.tensor(found).T.argsort().argsort().double()
    print(f"\nrank correlation of spread and jump: {torch.corrcoef(ranks)[0, 1]:.2f}")


if __name__ == "__main__":
    main()
