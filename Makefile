# Samovar: every target sets up .venv first, when pyproject.toml, constraints.txt or proto/ changed.
#
#   make demo        a cold prompt on one worker, the warm answer on another
#   make test        the fast tests;  make test-all  every test
#   make bench       one row per claim, each beside its limit
#   make lint        ruff, formatting, types;  make format  puts the formatting right
#   make clean       removes .venv and caches
#
# Without a GPU, save gigabytes of CUDA libraries on the first set-up by naming the index of
# PyTorch's CPU wheels (its install page has the address):
#   make demo TORCH_INDEX=URL
# Arguments go through:  make demo ARGS="--json"   make test ARGS="-k arena"

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard proto/*.py proto/kvstore/rpc/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all bench lint format docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

# The constraints go in with -c and not through the environment: there they would also reach the
# isolated build of the package itself, which needs another protobuf than it runs with.
$(READY): pyproject.toml constraints.txt $(PROTOS)
	@echo "==> Setting up $(VENV) (the first time: a few minutes, most of them for torch)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Samovar needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints.txt -e '.[demo,dev]'
	@touch $@
	@echo "==> $(VENV) is ready"

demo: $(READY)
	@$(BIN)/python -m worker.demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	@$(BIN)/python -m benchmarks $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)
	@$(BIN)/python -m kvstore.config > docs/config.md

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
