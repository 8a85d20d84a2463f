# The two commands: `make demo` and `make test`. Both set everything up first, in .venv.
# While working: `make check`, two minutes.
# Needed: python3 (3.10 or newer) and make; for the tests also g++, for the emulated GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The workers of pytest share the cores, so each of them computes with one thread.
ONE_THREAD := OMP_NUM_THREADS=1 TVM_NUM_THREADS=1

.PHONY: demo test test-all check compiler lint format clean

demo: $(READY)
	$(BIN)/python examples/compile_and_run.py

PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test: compiler lint
	$(PYTEST) -m "not exhaustive"

# Also the tests that tests/exhaustive.txt names.
test-all: compiler lint
	$(BIN)/python -m pip install --quiet --editable '.[ray]'
	$(PYTEST)

# Left out of `make check`, with the tests marked as slow: folders whose tests compile encoders,
# tune, or run the emulated GPU.
UNCHECKED := bench compiler emulated_gpu frontend/models frontend/torch pytorch runtime schedules tuning

check: lint
	$(PYTEST) -m "not slow and not exhaustive" $(UNCHECKED:%=--ignore=tests/%)

compiler:
	@command -v g++ >/dev/null || \
	  { echo 'g++ is needed for the tests: the emulated GPU is compiled with it' >&2; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/project/check_unpacked.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or newer is needed; name one: make PYTHON=python3.12 demo' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
