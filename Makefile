# mupx: `make demo` runs the main job on real data, `make test` runs the tests. No other set-up.
PYTHON ?= python3
VENV   := .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-slow check clean
.DEFAULT_GOAL := help

help:  ## Print this help
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mupx needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## Tune K-FAC at width 64 on Fashion-MNIST, transfer to width 1024, train it, show the regret
	@GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-1000} $(BIN)/python examples/01_tune_and_transfer.py  # as mupx does

test: $(STAMP)  ## Install and run the test suite, in JOBS processes (2)
	$(BIN)/python -m pytest --numprocesses $(JOBS)

test-slow: $(STAMP)  ## Run also the tests that take minutes
	$(BIN)/python -m pytest --numprocesses $(JOBS) -m 'not gpu and not dist and not postgres'

check: $(STAMP)  ## Run the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the virtual environment and caches (runs are kept)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
