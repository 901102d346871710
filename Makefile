VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What is installed for tests besides radixgen: tests of clusters want `dynamo` and `smg` too, and are skipped without.
EXTRAS ?= dev
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: demo test test-all check bench-check links clean

demo: $(VENV)/.demo
	$(BIN)/radixgen demo

test: check
	$(PYTEST)

# Nightly size: more examples, more combinations, the tests marked `nightly`.
test-all: check
	RADIXGEN_TEST_ALL=1 $(PYTEST)

check: $(VENV)/.$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two benchmark threads on two busy cores are slower than one, so each runs on one.
bench-check: $(VENV)/.$(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.startup --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.tree --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.plan --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.step --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.simulate --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.explain --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.prefix --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.unrelated --check

# They make a checkout look like an installation to tools that read files. Source distributions and some archives lack
# them, and need none to be installed.
links:
	@for name in kernels scheduler; do test -d radixgen/$$name || ln -sfn ../$$name radixgen/$$name; done

$(VENV)/.demo: pyproject.toml | links
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/.$(EXTRAS): $(VENV)/.demo
	$(BIN)/pip install --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
