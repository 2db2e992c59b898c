# Every target sets up what it needs; the second time is instant. Needs make and Python 3.11 or newer.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLIENTS := tests/kaleidoscope/serving/clients

.PHONY: setup demo test test-all lint format bench screenshot clean

setup: $(INSTALLED)

# Output goes to stderr, so that `make demo ARGS=--json` prints one JSON object on stdout even on a fresh machine.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Kaleidoscope needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) (minutes the first time)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]' >&2
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/kaleidoscope demo $(ARGS)

# The public JavaScript clients that the server is tested with; without npm that test is skipped, and fails in CI.
$(CLIENTS)/node_modules/.package-lock.json: $(CLIENTS)/package-lock.json
	@if command -v npm >/dev/null; then cd $(CLIENTS) && npm ci --silent --no-audit --no-fund >&2; fi

test: $(INSTALLED) $(CLIENTS)/node_modules/.package-lock.json
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(INSTALLED) $(CLIENTS)/node_modules/.package-lock.json
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	@$(BIN)/python benchmarks/combine.py
	@$(BIN)/python benchmarks/rank.py
	@$(BIN)/python benchmarks/decide.py
	@$(BIN)/python benchmarks/events.py
	@if command -v wrk >/dev/null; then $(BIN)/python benchmarks/serving.py; else echo "benchmarks/serving.py needs wrk"; fi
	@$(BIN)/python benchmarks/learn.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

screenshot: $(INSTALLED)
	$(BIN)/python docs/screenshot.py
