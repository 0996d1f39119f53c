# `make demo` and `make test` need nothing but Python >= 3.10; both set up .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
CONSTRAINTS ?= -c constraints.txt

# What an installation depends on: the extension is compiled while installing.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# A warning that the package causes is an error, but only here, with the versions of constraints.txt: elsewhere a new
# release of another library may deprecate something on any day.
WARNINGS ?= -o filterwarnings=error:::dab_fast
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal $(WARNINGS)

# Whose tolerances are to hold for any inputs.
ACCURACY := $(addprefix tests/test_,native.py cuda_on_cpu.py bounds.py box_position_embed.py refine_boxes.py \
	modulated_cross_attention.py modulated_cross_attention_kernel.py decoder.py triton_decoder.py)
SEEDS ?= 0 1 2 3 4 5 6 7 8 9

# The test files of one op, which its name begins.
OP_TESTS = $(wildcard tests/test_$(OP).py tests/test_$(OP)_*.py)

.PHONY: demo test check newest sweep seeds quick gpu pretend lint clean

demo: $(VENV)/.for-demo
	$(BIN)/dab-fast demo

test: lint check

check: $(VENV)/.for-test
	$(PYTEST) -m "not sweep and not gpu"

# As a new user gets it: the newest torch, in the build that PyPI gives, and the newest of all else.
newest:
	$(MAKE) check VENV=.venv-newest CONSTRAINTS= WARNINGS=

sweep: lint
	$(PYTEST) -m "not gpu"

seeds: $(VENV)/.for-test
	for seed in $(SEEDS); do $(PYTEST) -m "not sweep and not gpu" --seed $$seed $(ACCURACY) || exit 1; done

quick: $(VENV)/.for-test
	@test -n "$(OP_TESTS)" || { echo "OP must name an op, as in: make quick OP=refine_boxes; got OP=$(OP)" >&2; exit 1; }
	$(PYTEST) -m "not sweep and not gpu" $(OP_TESTS)

# What passed is recorded even where something else failed; the target then fails all the same.
gpu: $(VENV)/.for-test
	mkdir -p build
	$(PYTEST) -m gpu --junitxml=build/gpu.xml; status=$$?; \
		$(BIN)/python -m benchmarks.validate build/gpu.xml --out dab_fast/ops/validated.json && exit $$status

# The same on a CPU: tests/pretend_cuda, with Triton interpreted.
pretend: $(VENV)/.for-test
	$(BIN)/python -m tests.pretend_cuda $(PYTEST) -m gpu

lint: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(VENV)/.for-demo: EXTRAS := demo
$(VENV)/.for-test: EXTRAS := test

$(VENV)/.for-demo $(VENV)/.for-test: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info
