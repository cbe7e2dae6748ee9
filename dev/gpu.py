"""
Prove the job on a machine with CUDA GPUs, and write out/gpu/report.md. It needs no network.

    python -m dev.gpu                # all three parts: about half an hour on an H100
    python -m dev.gpu --part=tests   # the tests marked `device`: the CPU's numbers, compile, resume, data parallel
    python -m dev.gpu --part=speed   # bench.py: training steps at GPT-2's four sizes, evaluation, decoding
    python -m dev.gpu --part=job     # train a GPT-2 small on this machine's Python files, and remove its LayerNorms
    python -m dev.gpu --small        # try this script at toy sizes, on a CPU too

The report has each command with the end of its output. The same command continues an interrupted training. Tests,
evaluation and decoding need requirements-dev.txt.
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
tokenizer = "bytes"  # of the job; or gpt2, where tiktoken has its vocabulary in its cache
# -----------------------------------------------------------------------------
REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GPUS = torch.cuda.device_count()
SHAPES = {  # layers, heads, width; a batch for all ways of bench.py; the micro-batch of the removal's config
    "gpt2": (12, 12, 768, 16, 64),
    "gpt2-medium": (24, 16, 1024, 8, 32),
    "gpt2-large": (36, 20, 1280, 4, 16),
    "gpt2-xl": (48, 25, 1600, 2, 8),
}
TOY = (2, 2, 32, 1, 2)
LAST_LINES = 40  # of a command's output


def run(report, *command):
    """Run Python with these arguments, and add the command and the end of its output to the report. Returns True if it
    succeeded."""
    shown = f"python {shlex.join(command)}"
    print(shown, flush=True)
    done = subprocess.run([sys.executable, *command], env=os.environ | dict(PYTHONPATH=REPO), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.strip().splitlines()[-LAST_LINES:]
    if done.returncode:
        output.append(f"(exit code {done.returncode})")
    report += ["```", f"$ {shown}", *output, "```", ""]
    print(*output[-3:], sep="\n", flush=True)
    return done.returncode == 0


def sizes(shape, batch):
    """The flags of bench.py and train.py."""
    names = ("n_layer", "n_head", "n_embd", "batch_size")
    return [f"--{name}={value}" for name, value in zip(names, (*shape, batch))]


def tests(report):
    return run(report, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "device", f"{REPO}/tests")


def speed(report):
    """For each size, the ways of training, then the memory of a step at its config's micro-batch."""
    bench = ["-m", "dev.bench", "--block_size=64" if small else "--block_size=1024", "--rounds=1"]
    ok = True
    for *shape, batch, config_batch in [TOY] if small else SHAPES.values():
        way = "not compiled" if small else "bfloat16"  # toys take as long to compile
        ok &= run(report, *bench, *sizes(shape, batch), f"--way={way}")
        ok &= run(report, *bench, *sizes(shape, config_batch), "--way=not compiled", "--steps=1")
    *shape, _, _ = TOY if small else SHAPES["gpt2"]
    ok &= run(report, *bench, "--what=eval", *sizes(shape, 16))
    return run(report, *bench, "--what=sample", *sizes(shape, 1)) and ok


def job(report):
    """Prepare, pretrain, remove, control, evaluate."""
    text = "gpu_small" if small else "gpu_text"
    files = os.path.join(sysconfig.get_path("purelib"), "torch/nn" if small else "", "**", "*.py")
    if not os.path.exists(f"data/{text}/meta.json"):
        source = [f"--dataset={text}", f"--files={files}", f"--tokenizer={tokenizer}"]
        if not run(report, f"{REPO}/prepare_owt.py", *source):
            return False
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={GPUS}"] if GPUS > 1 else []
    data = [f"--dataset={text}", "--block_size=1024", f"--batch_size={batch_size}", "--checkpoint_interval=50"]
    if small:
        data = [f"--dataset={text}", "--block_size=64", "--batch_size=4", "--eval_iters=2", "--compile=False"]

    def train(name, start, configs, *flags):
        out = f"{out_dir}/{name}"
        begin = ["--init_from=resume"] if os.path.exists(f"{out}/ckpt.pt") else [f"--init_from={start}", "--force"]
        return run(report, *torchrun, f"{REPO}/train.py", *configs, *data, *flags, f"--out_dir={out}", *begin)

    *shape, _, _ = TOY if small else SHAPES["gpt2"]
    n = 20 if small else steps
    pretrain = [*sizes(shape, 4 if small else batch_size), f"--max_iters={n}", f"--lr_decay_iters={n}",
                "--warmup_iters=50", f"--gradient_accumulation_steps={max(1, GPUS)}"]
    removal = f"{REPO}/config/remove_ln_fast.py"
    fewer_tokens = f"--gradient_accumulation_steps={2 * max(1, GPUS)}"  # the config has 8 of 64 x 1,024
    start = f"{out_dir}/pretrained/model"
    models = [start, f"{out_dir}/removed_control", f"{out_dir}/removed"]
    tokens = 2_000 if small else 2_000_000
    return (
        train("pretrained", "scratch", [], *pretrain)
        and train("removed", start, [removal], fewer_tokens)
        and train("removed_control", start, [removal, f"{REPO}/config/control.py"], fewer_tokens)
        and run(report, f"{REPO}/eval.py", f"--models={','.join(models)}", f"--dataset={text}", f"--tokens={tokens}")
        and run(report, f"{REPO}/eval.py", "--verify", f"--models={models[-1]}")
    )


PARTS = dict(tests=tests, speed=speed, job=job)


def main():
    configure(globals(), sys.argv[1:], __doc__, at_least=dict(steps=1, batch_size=1), choices=dict(part=("", *PARTS)))
    if not GPUS and not small:
        raise UserError("there is no CUDA GPU: --small tries this script on the CPU")
    os.makedirs(out_dir, exist_ok=True)
    failed = []
    for name, do in PARTS.items():
        if part in ("", name):
            report = [f"## {name}", ""]
            if not do(report):
                failed.append(name)
            with open(f"{out_dir}/{name}.md", "w") as f:
                f.write("\n".join(report))
    machine = [f"Python {sys.version.split()[0]}, torch {torch.__version__}, {os.cpu_count()} CPU cores"]
    machine += [torch.cuda.get_device_name(i) for i in range(GPUS)]
    with open(f"{out_dir}/report.md", "w") as f:
        f.write("\n\n".join(["# LayerNorm out of GPT-2 on this machine", *machine]) + "\n\n")
        for name in PARTS:
            if os.path.exists(f"{out_dir}/{name}.md"):
                with open(f"{out_dir}/{name}.md") as part_report:
                    f.write(part_report.read() + "\n")
    if failed:
        raise UserError(f"{', '.join(failed)}: a command failed, see {out_dir}/report.md")
    print(f"next: read {out_dir}/report.md")


if __name__ == "__main__":
    main()
