#!/bin/bash
# Try everything on a machine with CUDA GPUs, without a network. out/gpu/{tests,speed,job}.txt get each command and the
# end of its output. The same command continues an interrupted training.
#
#     dev/gpu.sh                         # all three: about half an hour on an H100
#     dev/gpu.sh tests                   # the tests marked `device`: the CPU's numbers, compile, resume, data parallel
#     dev/gpu.sh speed                   # dev/bench.py: training at GPT-2's four sizes, evaluation, decoding
#     dev/gpu.sh job                     # pretrain a GPT-2 small on this machine's Python files, and remove its LNs
#     SMALL=1 PYTHON=python3 dev/gpu.sh  # toy sizes, on a CPU too, with another Python than .venv/bin/python
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-.venv/bin/python}
TOKENIZER=${TOKENIZER:-bytes}  # or gpt2, if tiktoken has cached its vocabulary
if [ "$SMALL" ]; then
    sizes=2,2,32,1,2 window=64 way=not files=nn/*.py  # "not compiled": toys take as long to compile
    steps=20 batch=4 flags="--compile=False --eval_iters=2 --max_iters=150" tokens=2000
else  # layers, heads, width; a batch for all ways of training; the micro-batch of the removal's config
    sizes="12,12,768,16,64 24,16,1024,8,32 36,20,1280,4,16 48,25,1600,2,8" window=1024 way=bfloat16 files=**/*.py
    steps=1500 batch=64 flags=--checkpoint_interval=50 tokens=2000000
fi

run() {
    echo "\$ python $*"
    "$PYTHON" "$@" 2>&1 | tail -40
    if [ "${PIPESTATUS[0]}" != 0 ]; then echo "(failed)"; fi
}

tests() {
    run -m pytest -q -p no:cacheprovider -m device tests
}

speed() {
    bench="-m dev.bench --rounds=1 --block_size=$window"
    for size in $sizes; do
        IFS=, read -r layers heads width all own <<< "$size"
        shape="--n_layer=$layers --n_head=$heads --n_embd=$width"
        run $bench $shape --batch_size=$all --way=$way
        run $bench $shape --batch_size=$own --way=not --steps=1
    done
    run $bench --what=eval --batch_size=16 ${SMALL:+$shape}
    run $bench --what=sample --batch_size=1 ${SMALL:+$shape}
}

job() {
    torch=$("$PYTHON" -c "import os, torch; print(os.path.dirname(torch.__file__))")
    gpus=$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")
    train="-m torch.distributed.run --standalone --nproc_per_node=$gpus train.py"
    data="--dataset=gpu_text$SMALL --block_size=$window --batch_size=$batch $flags"
    run prepare_owt.py --dataset=gpu_text$SMALL --files="$torch/$files" --tokenizer=$TOKENIZER
    IFS=, read -r layers heads width _ <<< "$sizes"
    run $train $data --init_from=scratch --init_from=auto --n_layer=$layers --n_head=$heads --n_embd=$width \
        --max_iters=$steps --lr_decay_iters=$steps --warmup_iters=50 --gradient_accumulation_steps=$gpus \
        --out_dir=out/gpu/pretrained
    removal="$data --init_from=out/gpu/pretrained/model --init_from=auto --gradient_accumulation_steps=$((2 * gpus))"
    run $train config/remove_ln_fast.py $removal --out_dir=out/gpu/removed
    run $train config/remove_ln_fast.py config/control.py $removal --out_dir=out/gpu/removed_control
    run eval.py --models=out/gpu/pretrained/model,out/gpu/removed_control,out/gpu/removed --dataset=gpu_text$SMALL \
        --tokens=$tokens
    run eval.py --verify --models=out/gpu/removed
}

mkdir -p out/gpu
for part in ${*:-tests speed job}; do
    [[ $part =~ ^(tests|speed|job)$ ]] || { echo "error: $part is not one of tests, speed and job"; exit 1; }
    "$PYTHON" -c "import platform, torch; print(f'Python {platform.python_version()}, torch {torch.__version__}',
        *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep=', ')" > out/gpu/$part.txt
    $part | tee -a out/gpu/$part.txt
    if grep -qx "(failed)" out/gpu/$part.txt; then failed=1; fi
done
exit ${failed:-0}
