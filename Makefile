# Two commands: `make demo` and `make test`. Both need Python 3.10 to 3.13 and nothing else.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif

.PHONY: help demo test test-slow bench lint format docs clean

help:  ## what can be made
	@$(PYTHON) -c "import re; [print(f'make {n:<10}{t}') for n, t in re.findall(r'^([a-z-]+):.*## (.*)', open('Makefile').read(), re.M)]"

demo: $(VENV)/.installed  ## make clips, train a tiny model on them, sample: a few minutes on a CPU
	$(BIN)/rin-video demo

test: $(VENV)/.installed-dev  ## the default tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev  ## all tests, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow"

bench: $(VENV)/.installed-dev  ## speed and memory against other packages and the machine: ten minutes
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.installed-dev  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed  ## the documentation: site/index.html
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else 'rin-video needs Python 3.10 to 3.13, this is %d.%d: make PYTHON=python3.12 ...' % sys.version_info[:2])"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@
