# Every target makes .venv and installs what is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help quickstart test test-fast lint docs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: the build that pip finds, CPU or CUDA, is settled before anything else asks for torch
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: $(VENV)/.installed  ## search a real loop on the embedded model, front and plot in results/quickstart
	$(BIN)/python -m steerheal.search quickstart

test: $(VENV)/.installed  ## every test: fast, then on the real model, then with Ray
	$(BIN)/python -m pytest

test-fast: $(VENV)/.installed  ## the fast tests alone, in seconds
	$(BIN)/python -m pytest -m "not real and not search"

lint: $(VENV)/.installed  ## ruff, mypy, and the trait files
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m steerheal.persona_lint

# without torch and Ray: the reference is read from the sources
$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material
	@touch $@

docs: $(VENV)/.docs  ## the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
