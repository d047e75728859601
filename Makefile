# Every target works on its own on a fresh clone: what it needs is set up first (in .venv, about two
# minutes) and found ready from then on.
#
#   make setup PYTHON=/path/to/python3.11    another Python than the first one that is new enough
#   make setup VENV=/path/to/venv            another place for the environment
#   make setup ACCELERATOR=cpu               not what nvidia-smi says
#   make setup TORCH_INDEX=https://...       another source of torch's CPU build
#   make demo ARGS="seed=1 name=second"      overrides of the config
#   make test PYTEST_ARGS="-x tests/algos"   other arguments of pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
CONFIG ?= configs/grpo/mini.yaml
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile --durations=15
BIN := $(VENV)/bin

export VENV PYTHON ACCELERATOR TORCH_INDEX
# Bytecode is written once instead of compiled at every start, and no foreign packages are seen.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME

.PHONY: help setup demo test lint lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## the environment: tested versions of everything, for the CPU or the GPU that is there
	@scripts/setup.sh

demo: setup ## trains configs/grpo/mini.yaml: a small model learns arithmetic, minutes on two cores
	@$(BIN)/rlalign train $(CONFIG) $(ARGS)

test: setup ## the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff, pyright, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-logo --no-cache

lock: setup ## (maintainers) requirements/*.txt anew from pyproject.toml
	@scripts/lock.sh $(ARGS)
