comma := ,
VENV ?= .venv
LOWEST ?= .venv-lowest
PYTHON ?= python3
BIN := $(VENV)/bin
# More extras for tests, with commas and no spaces: those of clusters need `dynamo,smg`, those of ONNX
# `onnx`; they are skipped otherwise.
TEST_EXTRAS ?=
EXTRAS := dev$(if $(TEST_EXTRAS),$(comma)$(TEST_EXTRAS))
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

.PHONY: demo docs test test-all test-lowest check bench-check links clean

demo: $(VENV)/.demo
	$(BIN)/radixgen demo

# The documentation as a site, in site/. Fails where a link or an anchor leads nowhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: check
	$(PYTEST)

# Nightly size: more examples, more combinations, the tests marked `nightly`.
test-all: check
	RADIXGEN_TEST_ALL=1 $(PYTEST)

# What depends most on the versions of others, on the lowest that pyproject.toml allows.
test-lowest: $(LOWEST)/.tests
	$(LOWEST)/bin/pytest $(addprefix tests/test_,model.py masks.py checkpoint.py exactness.py parallel.py ranks.py)

check: $(VENV)/.$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two benchmark threads on two busy cores are slower than one, so each runs on one.
bench-check: $(VENV)/.$(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.startup --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.tree --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.admission --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.plan --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.step --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.simulate --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.cluster --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.explain --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.prefix --check
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.unrelated --check

# An editable install and the tests need these links, which source distributions and some archives lack. Wheels and
# source distributions are built without them.
links:
	@for name in kernels scheduler; do test -d radixgen/$$name || ln -sfn ../$$name radixgen/$$name; done

$(BIN)/pip $(LOWEST)/bin/pip:
	$(PYTHON) -m venv $(@:/bin/pip=)

$(VENV)/.demo: pyproject.toml | links $(BIN)/pip
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/.docs: pyproject.toml | links $(BIN)/pip
	$(BIN)/pip install --editable '.[docs]'
	touch $@

$(VENV)/.$(EXTRAS): pyproject.toml | links $(BIN)/pip
	$(BIN)/pip install --editable '.[$(EXTRAS)]'
	touch $@

$(LOWEST)/.tests: pyproject.toml tests/lowest.txt | links $(LOWEST)/bin/pip
	$(LOWEST)/bin/pip install --constraint tests/lowest.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info
