# make demo: a virtual environment, then LayerNorm out of the bundled GPT-2, beside its control.   make test: the tests.
# make test-slow: those that take long.   make soak: faults at length.
# make test-tl3: those that need TransformerLens 3, in an environment of their own.
PYTHON ?= python3
# what these releases of the packages are built for
CHECK = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 14) or sys.exit(\
	"error: Python 3.11 to 3.14 is needed, and $(PYTHON) is %d.%d: make demo PYTHON=python3.12, for one" % v)'
RUN = out/remove_ln_tiny
CODE = train.py model.py schedule.py parts/data.py config/remove_ln_tiny.py $(wildcard assets/tiny/*)

demo: $(RUN)/model/config.json $(RUN)_control/model/config.json
	@echo "4 of 4: original, control and LN-free on the same windows: a minute"
	.venv/bin/python eval.py --models=assets/tiny,$(RUN)_control,$(RUN) --dataset=stdlib --tokens=500_000 --json=$(RUN)/eval.json
	.venv/bin/python -m tools.plot $(RUN)
	@echo "for these commands: source .venv/bin/activate"

$(RUN)/model/config.json: $(CODE) data/stdlib/meta.json
	@echo "2 of 4: the LayerNorms go, one at a time: about two minutes on two cores"
	.venv/bin/python train.py config/remove_ln_tiny.py --force

$(RUN)_control/model/config.json: $(CODE) config/control.py data/stdlib/meta.json
	@echo "3 of 4: the control, the same batches with its LayerNorms kept: two minutes more"
	.venv/bin/python train.py config/remove_ln_tiny.py config/control.py --force

# The testbed: half a minute for its text and 35 minutes for its model on two cores; then the table, some 50 runs of
# three to ten minutes each.
TEXTS = data/testbed_texts
PREPARE = .venv/bin/python prepare_owt.py --tokenizer=$(TEXTS)/tokenizer

testbed: .venv/installed
	.venv/bin/python dev/testbed/texts.py
	$(PREPARE) --dataset=testbed_pretrain --files='$(TEXTS)/pretrain/**/*.py'
	$(PREPARE) --dataset=testbed_tune --files='$(TEXTS)/tune/**/*.py'
	$(PREPARE) --dataset=testbed_choose --files='$(TEXTS)/choose/**/*.py' --val_every=1
	$(PREPARE) --dataset=testbed_report --files='$(TEXTS)/report/**/*.py' --val_every=1
	.venv/bin/python train.py config/pretrain_testbed.py

ablations:
	.venv/bin/python -m dev.ablations
	.venv/bin/python -m dev.ablations --show

# on a machine with CUDA GPUs; some half an hour, in parts that go on where they were stopped
gpu: .venv/installed
	.venv/bin/python -m dev.gpu checks
	.venv/bin/python -m dev.gpu speed
	.venv/bin/python -m dev.gpu job

data/stdlib/meta.json: | .venv/installed
	.venv/bin/python prepare_owt.py

# those that take longest, kills among them, are in test-slow: ten minutes more on two cores
test: .venv/installed-dev
	.venv/bin/python -m pytest -q -n 2 -m "not slow" tests

test-slow: .venv/installed-dev
	.venv/bin/python -m pytest -q -n 2 -m slow tests

# faults at length: some 45 minutes
soak: .venv/installed-dev
	.venv/bin/python tests/soak.py

test-tl3: .venv-tl3/installed
	.venv-tl3/bin/python -m pytest -q tests/transformer_lens_3.py

.venv-tl3/installed: requirements.txt requirements-tl3.txt
	@$(CHECK)
	$(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/pip install --quiet --disable-pip-version-check -r requirements-tl3.txt
	touch $@

.venv/installed: requirements.txt
	@$(CHECK)
	@echo "1 of 4: torch and eight more packages into .venv: one to five minutes, and 1 to 5 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-slow test-tl3 soak testbed ablations gpu
