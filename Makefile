# `make demo` and `make test` need nothing but Python >= 3.10; both set up .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# What an installation depends on: the extension is compiled while installing.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# A warning that the package causes is an error, but only here, with the versions of constraints.txt: elsewhere a new
# release of another library may deprecate something on any day.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal -o filterwarnings=error:::dab_fast

# The test files of one op, which its name begins.
OP_TESTS = $(wildcard tests/test_$(OP).py tests/test_$(OP)_*.py)

.PHONY: demo test sweep quick gpu lint clean

demo: $(VENV)/.for-demo
	$(BIN)/dab-fast demo

test: lint
	$(PYTEST) -m "not sweep and not gpu"

sweep: lint
	$(PYTEST) -m "not gpu"

quick: $(VENV)/.for-test
	@test -n "$(OP_TESTS)" || { echo "OP must name an op, as in: make quick OP=refine_boxes; got OP=$(OP)" >&2; exit 1; }
	$(PYTEST) -m "not sweep and not gpu" $(OP_TESTS)

# What passed is recorded even where something else failed; the target then fails all the same.
gpu: $(VENV)/.for-test
	mkdir -p build
	TRITON_INTERPRET=0 $(PYTEST) -m gpu --junitxml=build/gpu.xml; status=$$?; \
		$(BIN)/python -m benchmarks.validate build/gpu.xml --out dab_fast/ops/validated.json && exit $$status

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
