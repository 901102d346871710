VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test check bench-check clean

demo: $(VENV)/.demo
	$(BIN)/radixgen demo

test: check
	$(BIN)/pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two benchmark threads on two busy cores are slower than one, so each runs on one.
bench-check: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.tree --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.plan --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.step --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.simulate --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.explain --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.prefix --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.unrelated --check

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
