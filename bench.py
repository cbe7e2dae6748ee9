"""
Speed and memory of a training step, each way in a process of its own, in turns.

    python bench.py                                          # GPT-2 small's shape, 4 x 256 tokens a step
    python bench.py --n_layer=4 --n_head=6 --n_embd=192 --vocab_size=320 --batch_size=16

`nanoGPT's way` is this model as nanoGPT would train it on a CPU: float32, the logits whole, compiled. The other rows are train.py's.
A row's figures are the median over rounds; tokens a second of a step after the first two, peak memory of the process or the GPU.
"""
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext

import torch

from configurator import configure
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
batch_size = 4
block_size = 256
steps = 6  # timed, in a round
rounds = 3
way = ""  # one way in this process; empty: all of them, in processes
# -----------------------------------------------------------------------------

WAYS = {  # name: (dtype, loss in pieces, compiled)
    "nanoGPT's way": (torch.float32, False, True),
    "float32": (torch.float32, True, True),
    "bfloat16": (torch.bfloat16, True, True),
    "bfloat16, logits whole": (torch.bfloat16, False, True),
    "bfloat16, not compiled": (torch.bfloat16, True, False),
}


def one(dtype, in_pieces, compiled):
    """{"tokens_per_s", "memory_GB"} of one way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, eot=vocab_size - 1)).to(device)
    model.train(in_pieces)  # no dropout: evaluation differs in the whole logits only
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if compiled else model
    if compiled:
        model.summed_loss = torch.compile(model.summed_loss)
    idx = torch.randint(vocab_size - 1, (batch_size, block_size + 1), device=device)
    times = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
            loss = forward(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(tokens_per_s=batch_size * block_size * steps / sum(times[2:]), memory_GB=memory / 1e9)


def main():
    configure(globals(), sys.argv[1:], __doc__)
    if way:
        if way not in WAYS:
            sys.exit(f"error: unknown way {way!r}: it is one of {', '.join(WAYS)}")
        print(json.dumps(one(*WAYS[way])))
        return
    results = {name: [] for name in WAYS}
    for i in range(rounds):
        for name in WAYS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--way={name}"], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {name} failed: {done.stderr.strip().splitlines()[-1]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1} of {rounds}, {name}: {results[name][-1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    median = lambda values: sorted(values)[len(values) // 2]
    print(f"{'':<24}{'tokens/s':>10}{'ratio':>8}{'peak memory, GB':>18}")
    for name, runs in results.items():
        ratio = median([run["tokens_per_s"] / base["tokens_per_s"] for run, base in zip(runs, results["nanoGPT's way"])])
        print(f"{name:<24}{median([r['tokens_per_s'] for r in runs]):>10,.0f}{ratio:>8.2f}{median([r['memory_GB'] for r in runs]):>18.2f}")


if __name__ == "__main__":
    main()
