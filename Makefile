# Needs only Python >= 3.11 and make; everything else goes into .venv/ here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --constraint constraints.txt
DOCUMENTED := lrqp_torch $(addprefix lrqp_torch.,errors probes qp stream edits baselines learn sensitivity distributed tasks ioi models)
BENCHMARKS := $(subst /,.,$(basename $(shell grep -l __main__ benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help:
	@echo "make demo    run the study on the bundled model; then open results/organism/report.html"
	@echo "make test    run the tests"
	@echo "make lint    check style, format, types and who imports whom"
	@echo "make bench   run the benchmarks at a small size"
	@echo "make docs    build the API reference into site/"
	@echo "make clean   remove the environment, the results and all caches"

# torch is installed first and alone, so that a wheel which is already at hand (for example one
# without CUDA) satisfies what the other packages ask for.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, for example: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable '.[plots,report,gguf,leace,dev]'
	touch $@

# One thread: the bundled model is so small that more threads only wait for each other.
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/lrqp reproduce --model organism --n 1000 --prefixes bundled --sites all --out results/organism

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@set -e; for module in $(BENCHMARKS); do echo "== $$module"; $(BIN)/python -m $$module --small; done

docs: $(STAMP)
	$(BIN)/pdoc --docformat google --math --output-directory site $(DOCUMENTED)

clean:
	rm -rf $(VENV) results site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
