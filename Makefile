# make demo       train three models alike on the embedded data set and print the table (6 to 8 minutes on 2 cores)
# make test       lint, types, import directions, tests
# make lint       ruff and mypy alone
# make versions   tests of all that builds on transformers in five versions of it, and docs/versions.md (minutes)
# Each prepares .venv by itself when pyproject.toml is newer than it. PYTHON chooses the interpreter (>= 3.10).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint versions

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python recipes/motion_demo.py

test: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

versions: $(READY)
	$(BIN)/python tests/versions.py

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'tempme_vl needs Python 3.10 or newer; set PYTHON')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)
