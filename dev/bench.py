"""
Measure speed and memory, at GPT-2 small's shape with random weights.

    python -m dev.bench                   # a training step: train.py's beside nanoGPT's
    python -m dev.bench --what=eval       # the loss over windows, beside transformers
    python -m dev.bench --what=sample     # decoding: with LN beside transformers, folded beside with LN

Training: "nanoGPT's way" is nanoGPT's step written with our modules: one LN and one product for query, key and value,
F.layer_norm, whole logits, compiled. The other rows are train.py's step. Each runs in a process of its own, after two
warm-up steps. Peak memory is that of the GPU or, on a CPU, of the process. The other comparisons take turns, after a
round that does not count, and check that the results agree. They need requirements-dev.txt.
"""
import json
import subprocess
import sys
import tempfile
import time
from statistics import median

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure
from model import GPT, Block, GPTConfig, LayerNorm
from parts.compare import cast_linear_maps
from parts.device import autocast_to, keep_memory
from parts.loss import LossInPieces, token_losses
from tools.sample import generate, use_addmv

# -----------------------------------------------------------------------------
what = "train"  # train, eval or sample; step: one way of training in this process, as JSON
way = ""  # only the ways of training whose name contains this, such as bfloat16
rounds = 3  # measurements, whose median is printed
steps = 6  # training steps in a round
batch_size = 4  # sequences in a batch
block_size = 256  # tokens in a sequence
vocab_size = 50304  # tokens
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
# -----------------------------------------------------------------------------
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_model(positions=1024):
    torch.manual_seed(0)
    return GPT(GPTConfig(positions, vocab_size, n_layer, n_head, n_embd, eot=vocab_size - 1)).to(DEVICE)


WAYS = {  # arguments of measure_step
    "nanoGPT's way, float32": dict(dtype=torch.float32, plain=True),
    "nanoGPT's way, bfloat16": dict(dtype=torch.bfloat16, plain=True),
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16),
    "bfloat16, not compiled": dict(dtype=torch.bfloat16, compiled=False),
    "bfloat16, with a teacher": dict(dtype=torch.bfloat16, taught=True),
}


class PlainNorm(LayerNorm):
    def forward(self, x, use_bos):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class PlainBlock(Block):
    """Two LNs, and one product for query, key and value."""

    def forward(self, x, use_bos, *_):
        normed = self.ln_1qk(x, use_bos)
        x = x + self.attn(normed, normed)
        return x + self.mlp(self.ln_2(x, use_bos))


def of_logits(logits, targets, teacher_logits):
    """train.py's of_logits, with kl_share 0.5."""
    log_p = logits.log_softmax(-1)
    ce = F.nll_loss(log_p, targets, reduction="sum")
    if teacher_logits is None:
        return ce, {}
    kl = F.kl_div(log_p, teacher_logits.log_softmax(-1), reduction="sum", log_target=True)
    return 0.5 * ce + 0.5 * kl, {}


def measure_step(dtype, plain=False, compiled=True, taught=False):
    """Time training steps in this process. plain: nanoGPT's blocks and whole logits; taught: half of the loss is KL to
    a teacher. Returns {"tokens_per_s", "memory_GB", "loss": that of the first step}."""
    model = random_model(block_size)
    if plain:
        for module in model.modules():
            module.__class__ = {LayerNorm: PlainNorm, Block: PlainBlock}.get(type(module), type(module))
    else:
        keep_memory()
    teacher = random_model(block_size).eval().requires_grad_(False) if taught else None
    if teacher and compiled:
        teacher.hidden = torch.compile(teacher.hidden)
    forward = torch.compile(model) if compiled else model
    in_pieces = LossInPieces(of_logits, model.lm_head, teacher and teacher.lm_head, compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in train.py

    tokens = torch.randint(vocab_size - 1, (batch_size, block_size + 1), device=DEVICE)
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses, ends = [], []
    for _ in range(2 + steps):
        with autocast_to(dtype, DEVICE):
            if plain:
                _, loss = forward(x, y)
            else:
                _, hidden = forward(x, streams=True)
                loss, _ = in_pieces(hidden, y, teacher and teacher.hidden(x))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # .item() waits for the GPU
        ends.append(time.perf_counter())
    speed = batch_size * block_size * steps / (ends[-1] - ends[1])
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_memory()
    return dict(tokens_per_s=speed, memory_GB=memory / 1e9, loss=losses[0])


def peak_memory():
    """This process's peak memory in bytes."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare_steps():
    """Print the table of training: medians over rounds. A way that fails has its error as its row."""
    results = {name: [] for name in WAYS if way in name}
    if not results:
        raise UserError(f"--way={way}: choose one of {', '.join(WAYS)}, or a part of a name")
    for name in list(results) * rounds:
        command = [sys.executable, "-m", "dev.bench", *sys.argv[1:], "--what=step", f"--way={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]
        results[name].append(dict(error=last) if done.returncode else json.loads(last))
    print(f"{'':<26}{'tokens/s':>10}{'ratio':>8}{'peak memory, GB':>18}")
    base = None
    for name, found in results.items():
        errors = [run["error"] for run in found if "error" in run]
        if errors:
            print(f"{name:<26}{errors[0]}")
            continue
        speed, memory = (median(run[key] for run in found) for key in ("tokens_per_s", "memory_GB"))
        base = base or speed
        print(f"{name:<26}{speed:>10,.0f}{speed / base:>8.2f}{memory:>18.2f}")


def compare(name, unit, amount, theirs, ours, apart=1e-3):
    """Time two functions in turns, and print a row: amount / seconds of each, and how many times as fast ours is.
    Their results, numbers or arrays, must not differ by more than `apart`; None: they may differ."""
    times = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        expected = theirs()
        between = time.perf_counter()
        found = ours()
        times.append((between - began, time.perf_counter() - between))
        if apart is not None:
            np.testing.assert_allclose(found, expected, rtol=0, atol=apart)
    speeds = [amount / median(column) for column in zip(*times[1:])]
    ratios = [a / b for a, b in times[1:]]
    print(f"{name:<35} theirs {speeds[0]:>9,.1f}  ours {speeds[1]:>9,.1f} {unit}"
          f"  ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def transformers_twin(model):
    """transformers' GPT2LMHeadModel with the same weights."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).eval().to(DEVICE)


@torch.inference_mode()
def compare_eval():
    """eval.py's loss of a batch, beside transformers' logits and F.cross_entropy."""
    model = random_model().eval()
    hf = transformers_twin(model)
    x, y = torch.randint(vocab_size, (2, batch_size, block_size), device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:
            cast_linear_maps(model)

        def theirs():
            with autocast_to(dtype, DEVICE):
                logits = hf(x).logits.float()
            return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()

        def ours():
            with autocast_to(dtype, DEVICE):
                return token_losses(model, model.hidden(x).flatten(0, 1), y.flatten()).mean().item()

        compare(f"evaluation, {dtype}", "tokens/s", batch_size * block_size, theirs, ours)


def compare_sample(n=256):
    """The n likeliest tokens after a prompt of 16."""
    model = random_model().eval()
    hf = transformers_twin(model)
    free = random_model().eval()
    for site in free.sites().values():
        site.ln_mode = "fake"
    folded = free.fold()
    ids = list(range(100, 116))

    def decode(model):
        return list(generate(model, ids, n, 0, 0, None))

    def theirs():
        prompt = torch.tensor([ids], device=DEVICE)
        out = hf.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    for dtype in (torch.float32, torch.bfloat16):
        for m in (model, folded, hf):
            m.to(dtype)
        if dtype == torch.bfloat16 and DEVICE == "cpu":
            use_addmv(model)
            use_addmv(folded)
        apart = 0 if dtype == torch.float32 else None  # bfloat16 rounds, and the folded model is another one
        compare(f"LN to transformers, {dtype}", "tokens/s", n, theirs, lambda: decode(model), apart)
        compare(f"folded to LN, {dtype}", "tokens/s", n, lambda: decode(model), lambda: decode(folded), None)


WHATS = dict(train=compare_steps, eval=compare_eval, sample=compare_sample,
             step=lambda: print(json.dumps(measure_step(**WAYS[way]))))


def main():
    sizes = ("rounds", "steps", "batch_size", "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    configure(globals(), sys.argv[1:], __doc__, at_least=dict.fromkeys(sizes, 1), choices=dict(what=WHATS))
    WHATS[what]()


if __name__ == "__main__":
    main()
