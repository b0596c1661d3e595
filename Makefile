# The commands that people run. PYTHON chooses the interpreter, VENV where its packages go.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
CONFIG = configs/quickstart.py
# Processes that run tests; each takes a core and up to 4 GB
WORKERS ?= 2
# What of the suite to run, for example TESTS=tests/kernels; all by default
TESTS ?=
# Extra flags for training, for example TRAIN_FLAGS=--config.training.steps=20
TRAIN_FLAGS ?=
RUN_DIR ?= runs/quickstart

.PHONY: quickstart test test-slow lint format bench clean

quickstart: $(VENV)/.package
	$(RUN) -m jaxllm.prepare --config=$(CONFIG)
	$(RUN) -m jaxllm.train --config=$(CONFIG) --workdir=$(RUN_DIR) $(TRAIN_FLAGS)
	$(RUN) -m jaxllm.evaluate --model=$(RUN_DIR) --baselines
	@echo
	@echo "everything is in $(RUN_DIR): metrics.jsonl, samples/, checkpoints/, tensorboard/. Next, try:"
	@echo "  $(RUN) -m jaxllm.generate --model=$(RUN_DIR) --prompt='def main('"
	@echo "  $(RUN) -m jaxllm.train --config=$(CONFIG) --workdir=$(RUN_DIR)2 --config.model.num_layers=6"
	@echo "  $(RUN) -m jaxllm.train --help"

test: $(VENV)/.test
	$(RUN) -m pytest -n $(WORKERS) -m "not slow" $(TESTS)

test-slow: $(VENV)/.test
	$(RUN) -m pytest -n $(WORKERS) -m slow $(TESTS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

format: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.test
	$(RUN) tools/bench_train.py

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("jaxllm needs Python 3.11 or newer; choose one with PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --editable .
	touch $@

# On Python 3.11 torch comes first and alone: its CPU build then satisfies everything that asks for torch.
$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	if $(RUN) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then $(RUN) -m pip install --quiet torch==2.13.0; fi
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.package
