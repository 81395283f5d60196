# Samovar: every target sets up .venv first, when what it is made from changed.
#
#   make demo        a cold prompt on one worker, the warm answer on another
#   make test        the fast tests, shared by two processes;  make test-all  every test
#   make test-oldest the engine's tests with the oldest versions that pyproject.toml allows
#   make bench       one row per claim, each beside its limit
#   make lint        ruff, formatting, types;  make format  puts the formatting right
#   make clean       removes .venv and caches
#
# Without a GPU, save gigabytes of CUDA libraries on the first set-up by naming the index of
# PyTorch's CPU wheels (its install page has the address):
#   make demo TORCH_INDEX=URL
# Arguments go through:  make demo ARGS="--json"   make test ARGS="-k arena"
# In one process, for a debugger or to see what is printed:  make test WORKERS=0 ARGS="--pdb -s"

PYTHON ?= python3
TORCH_INDEX ?=
# What test-oldest runs with. The oldest in range is 2.6.0, with which it passes as well: its CPU build
# is on PyTorch's index only, the other one brings gigabytes of CUDA libraries.
TORCH ?= 2.13.0
# So many processes share a run of the tests, by tests/shares.py. One that hangs ends the run.
WORKERS ?= 2
SHARED = -n $(WORKERS) --max-worker-restart 0
ARGS ?=

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MADE_FROM := hatch_build.py $(wildcard proto/*.py proto/kvstore/rpc/*.proto native/*)

# Containers often set this. Each of the hundreds of processes that a test run starts would then
# compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest bench lint format docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

# The constraints go in with -c and not through the environment: there they would also reach the
# isolated build of the package itself, which needs another protobuf than it runs with.
$(READY): pyproject.toml constraints.txt $(MADE_FROM)
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
	@$(BIN)/python -m pytest $(SHARED) -m "not slow" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest $(SHARED) $(ARGS)

test-oldest: $(OLDEST)/.ready
	@$(OLDEST)/bin/python -m pytest tests/engine tests/unit/worker $(ARGS)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt $(MADE_FROM)
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-c constraints-oldest.txt -e '.[engine]' torch==$(TORCH) 'pytest>=9.0' 'hypothesis>=6.100'
	@touch $@

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
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
