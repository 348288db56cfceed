# `make demo` and `make test` work from a bare `python3 -m venv` and pip; everything goes into .venv and out/.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full lint install clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# Units, property tests, oracles, and one golden of each stage. The first run writes 5 GB of synthetic weights
# to the user's cache directory (USOFLOW_TEST_CACHE names another). Several processes with a thread each: most of
# the time goes into starting things.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n logical --maxprocesses 4 --dist loadfile

# Every golden and every conversion pair, too.
test-full: test
	$(BIN)/python -m pytest -m full -rs --durations 20

lint: $(VENV)/.installed-test
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "usoflow needs Python 3.11 or newer: make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }  # half of one would pass for whole

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[ui,test,train]
	@touch $@

clean:
	rm -rf $(VENV) out build dist
