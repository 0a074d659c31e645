# From nothing but python3 (3.11 or newer) and make: every target installs the pinned set into .venv first.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
CODE := segvit tests examples benchmarks

.DEFAULT_GOAL := help
# Without compiled files every start of Python would compile torch and timm anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help install demo test test-slow check format golden bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with the pinned packages and segvit itself, editable
	@:

$(STAMP): requirements.txt pyproject.toml
	@echo "Installing into .venv (the first time takes a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: install ## train a small model on generated images, offline; results in runs/demo
	@$(BIN)/python examples/demo.py --out runs/demo

test: install ## the test suite, without the slow tests
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: install ## long training runs, installs, whole-model counts
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow

check: install ## lint, formatting, types
	@$(BIN)/ruff check $(wildcard $(CODE))
	@$(BIN)/ruff format --check $(wildcard $(CODE))
	@$(BIN)/mypy

format: install ## rewrite the files as ruff wants them
	@$(BIN)/ruff check --fix $(wildcard $(CODE))
	@$(BIN)/ruff format $(wildcard $(CODE))

golden: install ## compare with the stored outputs of the original implementations
	@$(BIN)/python -m tests.golden $(dir $(wildcard tests/golden/*/case.json))

bench: install ## speed and memory on this machine
	@for name in aims inference readout metrics doctor train_step adapters; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean: ## remove caches and build results; .venv and runs stay
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(wildcard $(CODE)) -name __pycache__ -type d -prune -exec rm -rf {} +
