# make quickstart: the whole road on a tiny model.  make test: everything that CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN_STAMP := $(VENV)/.installed-run
TEST_STAMP := $(VENV)/.installed-test

.PHONY: quickstart test test-full lint benchmarks

quickstart: $(RUN_STAMP)
	$(BIN)/hymba-tune run recipes/sft1.yaml --tiny

test: lint
	$(BIN)/python -m pytest

test-full: lint
	$(BIN)/python -m pytest -m "full or not full"

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# gpu_*.py need an NVIDIA GPU: python -m benchmarks.gpu_NAME
benchmarks: $(TEST_STAMP)
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -v /gpu_); do \
		name=benchmarks.$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m $$name || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hymba-tune needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The test install holds all of the run install, so that it satisfies both.
$(RUN_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(TEST_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[eval,deepspeed,dev]"
	touch $@ $(RUN_STAMP)
