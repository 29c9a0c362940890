# Every target sets up what it needs in .venv; nothing has to be installed first but Python 3.10 or newer.
#   make demo      prune the embedded model; no network needed once the packages are there
#   make test      the test suite
#   make test-backends   sentence-transformers with its backends onnx and openvino, in .venv-optimum
#   make check     what a change must pass: format, lint, types, tables, tests
#   make coverage  the test suite again, and which lines of rfprune/ it reaches
PYTHON ?= python3
VENV ?= .venv
# Options for pytest, such as PYTEST_OPTIONS="-x tests/test_main.py".
PYTEST_OPTIONS ?=
BIN := $(VENV)/bin

# One thread a process: the models of the tests are tiny, and the tests run in parallel.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-backends check coverage format lint types tables clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp an environment: remade when what it was made from changes.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,onnx,openvino,gguf]'
	@touch $@ $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/python -m rfprune.main --model demo --task sst2 --constraint 0.5 --overwrite

test: $(VENV)/installed-dev
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n auto $(PYTEST_OPTIONS)

# The backends onnx and openvino of sentence-transformers need optimum, which needs transformers 4.
test-backends: $(VENV)/installed-dev
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/python -m pip install --quiet 'optimum-intel[openvino]==1.27.0' \
	    'optimum-onnx[onnxruntime]==0.1.0' 'sentence-transformers==5.2.0' 'transformers==4.57.6'
	RFPRUNE_OPTIMUM_PYTHON=$(VENV)-optimum/bin/python $(TEST_ENVIRONMENT) $(BIN)/python -m pytest \
	    tests/end_to_end/test_backends.py

coverage: $(VENV)/installed-dev
	rm -f .coverage .coverage.*
	$(TEST_ENVIRONMENT) $(BIN)/python -m coverage run -m pytest -n auto $(PYTEST_OPTIONS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# Every table shows what its result files hold, and the API page what the docstrings say.
tables: $(VENV)/installed-dev
	$(BIN)/python -m scripts.bench.tables --check
	$(BIN)/python scripts/build_api_page.py --check

check: lint types tables test

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
