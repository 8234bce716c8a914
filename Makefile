# make loop    a virtual environment, the stack, then the whole loop on the embedded pair
# make test    the same environment, then lint, types and tests (under 20 minutes on 2 cores)
# make mini    train the embedded pair again from random weights (about half an hour on 2 cores)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An editable install copies tasks/ and recipes/ into the environment: a change there installs again.
SOURCES := pyproject.toml constraints.txt $(shell find tasks recipes -type f -not -path 'recipes/mini/build/*' -not -name '*.pyc')

.PHONY: loop test test-all lint mini clean

loop: $(VENV)/installed
	$(BIN)/ts-loop --iters 3

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mini: $(VENV)/installed
	$(BIN)/python recipes/mini/make_pair.py

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
