# Everything a newcomer needs: `make demo`, `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= configs/quickstart.yaml
PACKAGES := rso schemas pipelines stages
SHELL := /bin/bash

# Offline machines otherwise log errors while these tools try to report their use.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export VLLM_NO_USAGE_STATS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

setup: $(READY)  ## create or update .venv from the pinned requirements

# A stamp, so that a finished set-up costs nothing; a set-up that was interrupted has none and goes on.
$(READY): requirements/cpu.txt requirements/dev.txt pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	@touch $@

# The words of the demo: this Python's own docstrings, so nothing is downloaded.
DATA := data/stdlib_docstrings.jsonl
$(DATA): examples/stdlib_docstrings.py | $(READY)
	@$(BIN)/python $< $@

demo: $(READY) $(DATA)  ## run configs/quickstart.yaml from raw text to an evaluated policy
	@$(BIN)/rso run $(CONFIG)

test: $(READY)  ## tests that fit in ten minutes, without network
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)  ## kills, real servers, several processes, end-to-end runs: at most forty minutes
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 1500

check: $(READY)  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hours each, and about the method rather than about speed: they are started by hand.
STUDIES := benchmarks/default_run.py benchmarks/ladder.py benchmarks/rankers.py

bench: $(READY) $(DATA)  ## time everything in benchmarks/, about an hour
	@$(BIN)/python -m pip install -qq --no-deps -r requirements/bench.txt
	@for script in $(filter-out $(STUDIES),$(sort $(wildcard benchmarks/[a-z]*.py))); do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove caches; .venv and the artifacts in runs/ stay
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	@find $(PACKAGES) tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
