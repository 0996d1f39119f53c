# `make demo` and `make test` need nothing but Python >= 3.10; both set up .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# What an installation depends on: the extension is compiled while installing.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test sweep lint clean

demo: $(VENV)/.for-demo
	$(BIN)/dab-fast demo

test: lint
	$(PYTEST) -m "not sweep and not gpu"

sweep: lint
	$(PYTEST) -m "not gpu"

lint: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/.for-demo: EXTRAS := demo
$(VENV)/.for-test: EXTRAS := test

$(VENV)/.for-demo $(VENV)/.for-test: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info
