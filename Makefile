PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help setup demo check test fuzz chaos chaos-selftest bench bench-gpu bench-checkpoint bench-corpus soak elastic test-slurm lint clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## create .venv and install the project with the versions that the tests run with

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "clippy_train needs Python 3.11 or newer; set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib # which pip does on one core
	@touch $@

demo: $(READY) ## corpus, tokenizer, training, export and generation on this Python's own source code, in minutes
	$(BIN)/clippy demo

check: lint ## lint, types and the quick tests, in a minute: run it before every commit
	$(BIN)/pytest -n 2 -m 'not slurm and not processes and not slow'

test: $(READY) ## the whole test suite
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

chaos: $(READY) ## interrupt runs at random moments, 200 times with kill -9 and 200 times with signals; two hours on two cores
	cd tests && ../$(BIN)/python -m tools.chaos kill
	cd tests && ../$(BIN)/python -m tools.chaos signal

chaos-selftest: $(READY) ## remove each protection from a copy of the package and check that the test that guards it fails
	cd tests && ../$(BIN)/python -m tools.chaos_selftest

.PHONY: docs
docs: $(READY) ## write docs/configuration.md from the keys and groups of all verbs, and the plan's table in docs/cluster.md
	cd tests && ../$(BIN)/python -m tools.make_configuration_docs
	cd tests && ../$(BIN)/python -m tools.make_plan_docs

fuzz: $(READY) ## the long form of the fuzz tests: 6,000 shards, 180,000 lines
	FUZZ_SHARDS=1500 $(BIN)/pytest -s --timeout=1800 tests/test_fuzz.py

elastic: $(READY) ## reshard a run through eleven layouts of ranks and strategies, 50 steps in each
	CLIPPY_ELASTIC_STEPS=50 $(BIN)/pytest --timeout 3600 tests/test_elastic.py

test-slurm: $(READY) ## real jobs on the Slurm that sbatch reaches; it needs two nodes that share this folder
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m slurm tests/test_slurm.py tests/test_corpus_slurm.py

lint: $(READY) ## style, types, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## compare the training step and the input pipeline with alternatives, in minutes; on an idle machine
	$(BIN)/pip install --quiet -c constraints.txt accelerate
	$(BIN)/python benchmarks/model.py cpu
	$(BIN)/python benchmarks/data.py speed

bench-gpu: $(READY) ## the training step on one GPU: alternatives, tokens/s, MFU, micro-batches, strategies
	$(BIN)/pip install --quiet -c constraints.txt accelerate
	$(BIN)/python benchmarks/model.py cuda

bench-checkpoint: $(READY) ## seconds and bytes of a checkpoint of GPT-Neo-125M's shape, in minutes
	$(BIN)/python benchmarks/checkpoint.py

bench-corpus: $(READY) ## building a corpus: speed per core, two workers, memory, and two alternatives, in a quarter of an hour
	$(BIN)/pip install --quiet -c constraints.txt orjson 'xxhash<4'
	$(BIN)/python benchmarks/corpus.py

soak: $(READY) ## check that the input pipeline's memory stays constant, in 25 minutes
	$(BIN)/python benchmarks/soak.py

clean: ## delete the virtual environment and the files of demo and tests; keep runs/
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
