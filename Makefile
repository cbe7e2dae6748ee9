# make demo: a virtual environment, then LayerNorm out of the bundled GPT-2, beside its control.   make test: the tests.
# make test-tl3: those that need TransformerLens 3, in an environment of their own.
PYTHON ?= python3
RUN = out/remove_ln_tiny
CODE = train.py model.py schedule.py parts/data.py config/remove_ln_tiny.py $(wildcard assets/tiny/*)

demo: $(RUN)/model/config.json $(RUN)_control/model/config.json
	.venv/bin/python eval.py --models=assets/tiny,$(RUN)_control,$(RUN) --dataset=stdlib --tokens=500_000 --json=$(RUN)/eval.json
	.venv/bin/python plot.py $(RUN)

$(RUN)/model/config.json: $(CODE) data/stdlib/meta.json
	.venv/bin/python train.py config/remove_ln_tiny.py --force

$(RUN)_control/model/config.json: $(CODE) config/control.py data/stdlib/meta.json
	.venv/bin/python train.py config/remove_ln_tiny.py config/control.py --force

data/stdlib/meta.json: | .venv/installed
	.venv/bin/python prepare_owt.py

test: .venv/installed-dev
	.venv/bin/python -m pytest -q -n 2 tests

test-tl3: .venv-tl3/installed
	.venv-tl3/bin/python -m pytest -q tests/transformer_lens_3.py

.venv-tl3/installed: requirements.txt requirements-tl3.txt
	$(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/pip install --quiet --disable-pip-version-check -r requirements-tl3.txt
	touch $@

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-tl3
