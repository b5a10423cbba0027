# Needs only Python >= 3.11 and make; everything else goes into .venv/ here.
PYTHON ?= python3
# Another interpreter, as in `make test PYTHON=python3.13`, has an environment of its own.
VENV := .venv$(if $(filter command,$(firstword $(origin PYTHON))),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --constraint constraints.txt
# The versions of transformers that `make test-matrix` runs the tests of the stream against.
TRANSFORMERS := $(shell sed -n 's/^TESTED_TRANSFORMERS = //p' lrqp_torch/stream/__init__.py | tr -d '(),"')
NEWEST := $(lastword $(TRANSFORMERS))
MATRIX := .venv-matrix
# Triton, of which the interpreter runs the tests of the kernel without a GPU; of the version that
# comes with the newest torch for CUDA.
TRITON := 3.6.0
# vLLM wants other versions of the packages than this project, so it has an environment of its own.
SERVING := .venv-serving
CPU_WHEELS := https://download.pytorch.org/whl/cpu
SHORT := $(addprefix tests/stream/test_,generation.py passes.py replay.py tail.py hooks_cache.py attention.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix test-newest test-kernel test-serving lint bench docs notebooks clean

help:
	@echo "make demo         run the study on the bundled model; then open results/organism/report.html"
	@echo "make test         run the tests"
	@echo "make test-matrix  run those of the stream against other versions of transformers"
	@echo "make test-newest  run a few of them against the newest of these"
	@echo "make test-kernel  run those of the GPU kernel, through an interpreter where there is no GPU"
	@echo "make test-serving run those of the edits inside vLLM, on the CPU, in an environment of its own"
	@echo "make lint         check style, format, types and who imports whom"
	@echo "make bench        hold what an edit costs against aims (five minutes); python -m benchmarks.NAME"
	@echo "                  --small runs any one of benchmarks/"
	@echo "make docs         build the site of pages, notebooks and API into site/, links checked; then"
	@echo "                  python -m http.server --directory site"
	@echo "make notebooks    run the notebooks of docs/ anew, and keep their outputs"
	@echo "make clean        remove the environment, the results and all caches"

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

# A process a core, each with one thread.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Each version is installed, with what it alone needs otherwise, in front of the other packages.
$(MATRIX)/%/.installed: $(STAMP)
	$(BIN)/python -m venv $(MATRIX)/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(MATRIX)/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
	$(MATRIX)/$*/bin/python -m pip install transformers==$*
	touch $@

test-matrix: $(TRANSFORMERS:%=$(MATRIX)/%/.installed)
	@set -e; for version in $(TRANSFORMERS); do \
		echo "== transformers $$version"; $(MATRIX)/$$version/bin/python -m pytest tests/stream; \
	done

test-newest: $(MATRIX)/$(NEWEST)/.installed
	$(MATRIX)/$(NEWEST)/bin/python -m pytest $(SHORT)

$(MATRIX)/triton-$(TRITON)/.installed: $(STAMP)
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
	$(@D)/bin/python -m pip install triton==$(TRITON)
	touch $@

test-kernel: $(MATRIX)/triton-$(TRITON)/.installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(MATRIX)/triton-$(TRITON)/bin/python -m pytest tests/qp/test_kernel.py --numprocesses auto

# All of the list and nothing that it would bring along; where a package is not to be had as it stands
# there, those that are not are named.
$(SERVING)/.installed: pyproject.toml constraints-serving.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	@install="$(SERVING)/bin/python -m pip install --no-deps"; list=constraints-serving.txt; \
	torch=$$(grep '^torch==' $$list); \
	$$install "$$torch" || $$install --extra-index-url $(CPU_WHEELS) "$$torch"; \
	$$install --requirement $$list || { \
		missing=; for package in $$(grep -v '^#' $$list); do \
			$$install --quiet "$$package" >/dev/null 2>&1 || missing="$$missing $$package"; \
		done; echo "make test-serving: these cannot be had here:$$missing" >&2; exit 1; }
	$(SERVING)/bin/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@

# One thread a process; vLLM binds none of them to a core, and keeps 1 GiB for its cache. Its second
# model runner needs Triton, of which no package has a backend for CPUs; the interpreter takes its place.
ON_A_CPU := OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1
test-serving: $(SERVING)/.installed
	$(ON_A_CPU) $(SERVING)/bin/python -m pytest tests/serving
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 $(ON_A_CPU) \
		$(SERVING)/bin/python -m pytest tests/serving/test_plugin.py -k "mixed or scopes or several_edits or never_read"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.ratios

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict --clean --config-file docs/site/mkdocs.yml

notebooks: $(STAMP)
	$(BIN)/python docs/notebooks/make.py

clean:
	rm -rf $(VENV) .venv-* results site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
