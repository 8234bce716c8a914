# make loop    a virtual environment, the stack, then the whole loop on the embedded pair
# make test    the same environment, then lint, types and tests (6 minutes on 2 cores; test-all has the long ones)
# make results the tables and plots of docs/results.md and the README again, from the records in docs/results/
# make mutants which changes to the plan, the store, the statistics, … no test would notice (hours; docs/mutants.md)
# make mini    train the embedded pair again from random weights (about half an hour on 2 cores)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An editable install copies tasks/ and recipes/ into the environment: a change there installs again.
SOURCES := pyproject.toml constraints.txt $(shell find tasks recipes -type f -not -path 'recipes/mini/build/*' -not -name '*.pyc')

CHECKPOINT := config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja model.safetensors

.PHONY: loop test test-all lint results mutants mini clean

loop: $(VENV)/installed
	$(BIN)/ts-loop --iters 3

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(VENV)/installed
	$(BIN)/python benchmarks/results.py

# One at a time, as some tests measure how long things take. What was killed is not run again until its function changes.
mutants: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 1
	$(BIN)/python -m mutmut results

# The checkpoints are what the native recipes leave; only what a checkpoint needs is kept.
mini: $(VENV)/installed
	$(BIN)/python recipes/mini/world.py
	for step in base instruct thinking; do \
		AXOLOTL_DO_NOT_TRACK=1 $(BIN)/axolotl train recipes/mini/$$step.yml --launcher python || exit 1; \
	done
	for who in instruct thinking; do \
		mkdir -p recipes/mini/$$who && for file in $(CHECKPOINT); do \
			cp recipes/mini/build/$$who/$$file recipes/mini/$$who/ || exit 1; \
		done; \
	done

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs mutants
