# make demo: a virtual environment, then LayerNorm out of the bundled GPT-2, beside its control.
# make test: the tests.   make test-slow: the longer ones.   make soak: kills at length.
PYTHON ?= python3
CHECK = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 14) or sys.exit(\
	"error: Python 3.11 to 3.14 is needed, and $(PYTHON) is %d.%d: make demo PYTHON=python3.12, for example" % v)'
RUN = out/remove_ln_tiny
CODE = train.py model.py schedule.py parts/loss.py parts/data.py config/remove_ln_tiny.py config/control.py \
	$(wildcard assets/tiny/*)

demo: $(RUN)/done
	@echo "3 of 3: original, control and LN-free on the same windows: about a minute"
	.venv/bin/python eval.py $(RUN) --tokens=300_000
	.venv/bin/python -m tools.plot $(RUN)
	@echo "for these commands: source .venv/bin/activate"

# both at a time, a thread each: together they are faster than one after the other with two
$(RUN)/done: $(CODE) data/stdlib/meta.json
	@echo "2 of 3: the LayerNorms go, one at a time, and beside it the control, which keeps them: one to three minutes"
	OMP_NUM_THREADS=1 .venv/bin/python train.py config/remove_ln_tiny.py config/control.py --force > $(RUN)_control.txt & \
	OMP_NUM_THREADS=1 .venv/bin/python train.py config/remove_ln_tiny.py --force && wait $$!
	touch $@

data/stdlib/meta.json: | .venv/installed
	.venv/bin/python prepare_owt.py
	mkdir -p out

test: .venv/installed-dev
	.venv/bin/python -m pytest -q -n 2 -m "not slow" tests

test-slow: .venv/installed-dev
	.venv/bin/python -m pytest -q -n 2 -m slow tests

# TransformerLens 3, in an environment of its own
test-tl3: .venv-tl3/installed
	.venv-tl3/bin/python -m pytest -q tests/transformer_lens_3.py

# kills and fuzzing at length: some 45 minutes
soak: .venv/installed-dev
	.venv/bin/python tests/soak.py

# on a machine with CUDA GPUs
gpu: .venv/installed-dev
	dev/gpu.sh

# docs/results.md: half a minute for the text and 40 minutes for the models on two cores
TEXTS = data/testbed_texts
PREPARE = .venv/bin/python prepare_owt.py --tokenizer=$(TEXTS)/tokenizer

testbed: .venv/installed
	.venv/bin/python dev/testbed/texts.py
	$(PREPARE) --dataset=testbed_pretrain --files='$(TEXTS)/pretrain/**/*.py'
	$(PREPARE) --dataset=testbed_tune --files='$(TEXTS)/tune/**/*.py'
	$(PREPARE) --dataset=testbed_choose --files='$(TEXTS)/choose/**/*.py' --val_every=1
	$(PREPARE) --dataset=testbed_report --files='$(TEXTS)/report/**/*.py' --val_every=1
	.venv/bin/python -m dev.tails
	.venv/bin/python train.py config/pretrain_testbed.py
	.venv/bin/python -m dev.outliers
	.venv/bin/python train.py config/pretrain_testbed.py --init_from=out/testbed_outliers0/model --seed=7 \
		--out_dir=out/testbed_outliers --max_iters=150 --lr_decay_iters=150 --warmup_iters=20 \
		--learning_rate=5e-4 --min_lr=5e-5

# some 50 runs of three to ten minutes each
ablations:
	.venv/bin/python -m dev.ablations
	.venv/bin/python -m dev.ablations --show

.venv/installed: requirements.txt
	@$(CHECK)
	@echo "1 of 3: torch and eight more packages into .venv: one to five minutes, and 1 to 5 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv-tl3/installed: requirements.txt requirements-tl3.txt
	@$(CHECK)
	$(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/pip install --quiet --disable-pip-version-check -r requirements-tl3.txt
	touch $@

.PHONY: demo test test-slow test-tl3 soak gpu testbed ablations
