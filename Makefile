# make demo: the main job. make test: everything that must hold. Both need Python 3.10 to 3.12 and pip only
# (g++ lets the tests run the AscendC operators on their CPU twin).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The version that everything was measured with; the README says which others were tried.
MINDSPORE ?= 2.9.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The version that the measurements were made with. On Linux the package index's build of it brings
# CUDA libraries along; the README says how to get the CPU build instead.
TORCH ?= torch==2.13.0
PIP_ARGS ?=
# MindFormers 1.9 wants MindSpore 2.9, and 2.1, which takes 2.10, a transformers that nothing here was
# measured with: beside another MindSpore the tests of the adapter are left out.
EXTRAS := align,docs,peft,serve,test
ifneq ($(filter 2.9.%,$(MINDSPORE)),)
EXTRAS := $(EXTRAS),mindformers
endif

export GLOG_v ?= 3

.PHONY: install demo test fast bench mutants fuzz docs lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Python 3.10 to 3.12 is needed: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) "mindspore==$(MINDSPORE)" "$(TORCH)" -e ".[$(EXTRAS)]"
	touch $(STAMP)

demo: install
	$(BIN)/python run_mixtral.py demo

test: lint
	$(BIN)/python -m pytest -n 3

# What a person runs while working: everything that needs no process of its own.
fast: install
	$(BIN)/python -m pytest -n 2 --fast

# Speed beside other programs, about a quarter of an hour on a machine with nothing else to do: writes
# benchmarks/results and the tables and pictures of docs/performance.md and its translation.
bench: install
	$(BIN)/python run_mixtral.py bench all --output benchmarks/results
	$(BIN)/python -m benchmarks.page benchmarks/results docs/performance.md docs/performance_CN.md

# Plants defects, one after the other; each must be noticed by the fast tests.
mutants: install
	$(BIN)/python tests/mutants/run.py

# Damaged and hostile files for every reader: as many cases as you like, with a seed that is printed.
CASES ?= 10000
fuzz: install
	PYTHONPATH=.:tests $(BIN)/python -m fuzz --cases $(CASES) $(if $(SEED),--seed $(SEED))

# The documentation as a site, in site/; broken links end it.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html"

lint: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) demo rank_* *.egg-info .pytest_cache .ruff_cache .mypy_cache
