"""
Prove the job on a machine with CUDA GPUs, and write out/gpu/report.md, or PART.md. It needs no network.

    python -m dev.gpu                # all three parts: about half an hour on an H100
    python -m dev.gpu --part=tests   # the tests marked `device`: the CPU's numbers, compile, resume, data parallel
    python -m dev.gpu --part=speed   # dev/bench.py: training steps at GPT-2's four sizes, evaluation, decoding
    python -m dev.gpu --part=job     # train a GPT-2 small on this machine's Python files, and remove its LayerNorms
    python -m dev.gpu --small        # try this script at toy sizes, on a CPU too

The report has each command with the end of its output. A command that fails ends its part. The same command continues
an interrupted training. Tests, evaluation and decoding need requirements-dev.txt.
"""
import os
import shlex
import subprocess
import sys
import sysconfig

from parts.errors import UserError, begin_script

if __name__ == "__main__":
    begin_script()  # before the slow imports

import torch

from configurator import configure

# -----------------------------------------------------------------------------
part = ""  # tests, speed or job; "": all
small = False  # toy sizes, for a CPU
out_dir = "out/gpu"  # gets report.md, and the runs
steps = 1500  # the job's pretraining steps of 64 x 1,024 tokens: about four minutes on an H100
batch_size = 64  # the job's micro-batch; 64 needs 80 GB
tokenizer = "bytes"  # the job's tokenizer: bytes, or gpt2 if tiktoken has cached its vocabulary
# -----------------------------------------------------------------------------
REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPUS = torch.cuda.device_count()
GPT2 = "--n_layer=12 --n_head=12 --n_embd=768"
SHAPES = {  # flags; a batch that all ways of dev/bench.py can take; the micro-batch of the removal's config
    GPT2: (16, 64),
    "--n_layer=24 --n_head=16 --n_embd=1024": (8, 32),
    "--n_layer=36 --n_head=20 --n_embd=1280": (4, 16),
    "--n_layer=48 --n_head=25 --n_embd=1600": (2, 8),
}
TOY = "--n_layer=2 --n_head=2 --n_embd=32"
LAST_LINES = 40  # lines of a command's output to keep in the report


def tests():
    return [f"-m pytest -q -p no:cacheprovider -m device {REPO}/tests"]


def speed():
    """For each size, the ways of training, then the memory of a step at its config's micro-batch."""
    bench = f"-m dev.bench --block_size={64 if small else 1024} --rounds=1"
    way = "'--way=not compiled'" if small else "--way=bfloat16"  # toys take as long to compile
    commands = []
    for shape, (batch, config_batch) in {TOY: (1, 2)}.items() if small else SHAPES.items():
        commands.append(f"{bench} {shape} --batch_size={batch} {way}")
        commands.append(f"{bench} {shape} --batch_size={config_batch} '--way=not compiled' --steps=1")
    shape = TOY if small else GPT2
    return [*commands, f"{bench} --what=eval {shape} --batch_size=16", f"{bench} --what=sample {shape} --batch_size=1"]


def job():
    """Prepare, pretrain, remove, control, evaluate."""
    files = os.path.join(sysconfig.get_path("purelib"), "torch/nn" if small else "", "**", "*.py")
    text = "gpu_small" if small else "gpu_text"
    prepare = f"{REPO}/prepare_owt.py --dataset={text} --files='{files}' --tokenizer={tokenizer}"
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={GPUS} " if GPUS > 1 else ""
    data = f"--dataset={text} --block_size=1024 --batch_size={batch_size} --checkpoint_interval=50"
    if small:
        data = f"--dataset={text} --block_size=64 --batch_size=4 --eval_iters=2 --compile=False"
    n = 20 if small else steps
    shape = f"{TOY if small else GPT2} --max_iters={n} --lr_decay_iters={n} --warmup_iters=50"
    each = max(1, GPUS)  # accumulation steps; the config has 8 of 64 x 1,024
    original = f"{out_dir}/pretrained/model"
    begin = f"--init_from={original} --init_from=auto --gradient_accumulation_steps={2 * each}"
    train, removal = f"{torchrun}{REPO}/train.py", f"{REPO}/config/remove_ln_fast.py"
    removed, control = f"{out_dir}/removed", f"{out_dir}/removed_control"
    return [
        prepare,
        f"{train} {data} {shape} --out_dir={out_dir}/pretrained --init_from=scratch --init_from=auto "
        f"--gradient_accumulation_steps={each}",
        f"{train} {removal} {data} {begin} --out_dir={removed}",
        f"{train} {removal} {REPO}/config/control.py {data} {begin} --out_dir={control}",
        f"{REPO}/eval.py --models={original},{control},{removed} --dataset={text} --tokens={2000 if small else 2e6:.0f}",
        f"{REPO}/eval.py --verify --models={removed}",
    ]


PARTS = dict(tests=tests, speed=speed, job=job)


def run(command, report):
    """Run Python with these arguments, and add the command and the end of its output to the report. Returns True if it
    succeeded."""
    print(f"python {command}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], env=os.environ | dict(PYTHONPATH=REPO), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.strip().splitlines()[-LAST_LINES:]
    if done.returncode:
        output.append(f"(exit code {done.returncode})")
    report += ["```", f"$ python {command}", *output, "```", ""]
    print(*output[-3:], sep="\n", flush=True)
    return done.returncode == 0


def main():
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(steps=1, batch_size=1), choices=dict(part=("", *PARTS)))
    if not GPUS and not small:
        raise UserError("there is no CUDA GPU: --small tries this script on the CPU")
    os.makedirs(out_dir, exist_ok=True)
    machine = ", ".join([f"Python {sys.version.split()[0]}, torch {torch.__version__}, {os.cpu_count()} CPU cores",
                         *(torch.cuda.get_device_name(i) for i in range(GPUS))])
    file = f"{out_dir}/{part or 'report'}.md"
    failed = []
    report = ["# LayerNorm out of GPT-2 on this machine", "", machine, ""]
    for name in [part] if part else PARTS:
        report += [f"## {name}", ""]
        if not all(run(command, report) for command in PARTS[name]()):
            failed.append(name)
        with open(file, "w") as f:
            f.write("\n".join(report))
    if failed:
        raise UserError(f"{', '.join(failed)}: a command failed, see {file}")
    print(f"next: read {file}")


if __name__ == "__main__":
    main()
