# Everything from a bare Python 3.11: `make demo`, `make test`, `make lint`, `make bench`, `make serve`.
#   DEVICE=cpu|cuda   which vLLM to install (default: cuda where there is an NVIDIA GPU)
#   FLORA_CACHE=DIR   where models are kept (default: .cache)
#   PYTEST_ARGS=...   what `make test` runs instead of everything, for example PYTEST_ARGS='-m "not engine"'
# `make test` runs all tests but slow sweeps, `make test-all` those too, `make test-cluster` those that start Ray and kill
# its nodes, `make conformance` stock vLLM's LoRA tests on stock and on ours.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= auto
export FLORA_CACHE ?= $(CURDIR)/.cache
BIN := .venv/bin
MODEL ?= $(FLORA_CACHE)/smollm2
FAST = and not slow
ADAPTERS ?= $(foreach dir,$(wildcard flora_vllm/demo/adapters/*/),$(notdir $(patsubst %/,%,$(dir)))=$(dir))

# vLLM imports thousands of files: without their bytecode, each start of a server or a test engine takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup model demo test test-all test-cluster conformance soak fuzz lint table format bench serve
.DEFAULT_GOAL := demo

setup:
	@$(PYTHON) -I flora_vllm/commands/bootstrap.py --device $(DEVICE)

model: setup
	@$(BIN)/flora-vllm model $(MODEL)

demo: setup
	@$(BIN)/flora-vllm demo

# The cluster's tests come after all others and one at a time: they count on the machine's cores and memory.
test: setup
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(or $(PYTEST_ARGS),-m "not cluster $(FAST)") || failed=1; \
	$(if $(PYTEST_ARGS),,$(BIN)/python -m pytest -m cluster || failed=1;) \
	exit $$failed

test-all:
	@$(MAKE) test FAST=

test-cluster: setup
	@$(BIN)/python -m pytest -m cluster

# What stock vLLM's LoRA does and we must: its server beside ours, then vLLM's own tests, which are downloaded.
conformance: setup
	@$(BIN)/python -m pytest tests/test_conformance.py && $(BIN)/python tests/conformance.py

# Random loads and unloads under checked traffic for an hour; MINUTES=5 for less.
soak: setup
	@$(BIN)/python tests/soak.py --minutes $(or $(MINUTES),60)

# Adapters of every family changed at random, refused or read as PEFT reads them; MUTANTS=500 for less.
fuzz: setup
	@$(BIN)/python tests/fuzz.py --mutants $(or $(MUTANTS),12000)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# README's table of families, from the rows.
table: setup
	@$(BIN)/python -c "from pathlib import Path; from flora_vllm.formats.family_table import family_table, group_table, write_into; \
	write_into(Path('README.md'), group_table()); write_into(Path('flora_vllm/formats/README.md'), family_table())"

format: setup
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: setup
	@$(BIN)/flora-vllm bench

serve: model
	$(BIN)/vllm serve $(MODEL) --enable-flora --max-loras 8 $(if $(ADAPTERS),--lora-modules $(ADAPTERS))
