# Shoal. `make help` lists the targets.

PYTHON ?= python3
PORT ?= 8000
MODEL ?= smollm2-135m
DIR ?= models/$(MODEL)-pruned
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup run test check lint clean
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

test: setup ## Run the tests, on real models and the real engine
	$(BIN)/python -m pytest

check: lint ## The same

lint: setup ## Formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove the environment and the models made here
	rm -rf $(VENV) models
