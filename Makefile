# `make demo` and `make test` need nothing but Python >= 3.10; both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install demo test sweep lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[hf,demo,bench,test]'
	touch $@

demo: install
	$(BIN)/dab-fast demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n $(WORKERS) -m "not sweep and not gpu"

sweep: lint
	$(BIN)/pytest -n $(WORKERS) -m "not gpu"

clean:
	rm -rf $(VENV) build dist *.egg-info
