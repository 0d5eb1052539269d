# Each target does its own set-up: a virtual environment, pinned requirements, the build. `make help` lists them.
#
# Variables: VENV (.venv); PYTHON, the interpreter to make it with; DML_BUILD_CUDA=auto|0|1, see setup.py;
#   DEMO_ARGS, TEST_ARGS, BENCH_ARGS, passed on;
#   TORCH_REQUIREMENT, any requirement pip takes, in place of requirements/torch.txt. The plain torch wheel for Linux on
#   x86-64 holds CUDA (several GB). Without an NVIDIA GPU, point pip at PyTorch's CPU index, as its "Get started" page
#   shows (--index-url URL), and run: make demo TORCH_REQUIREMENT="torch==2.13.0 --extra-index-url URL"
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-all test-triton kernel-report cuda-stack bench bench-refresh bench-losses gpu lint format sanitize clean distclean FORCE

VENV ?= .venv
TORCH_REQUIREMENT ?= -r requirements/torch.txt
export PY := $(abspath $(VENV))/bin/python
# The tests of the compiled code fail instead of being skipped: the extension was built for them.
export DML_REQUIRE_CPU ?= 1
# A process a core, one thread in each; the tests of threads set their own number.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto
PIP := $(PY) -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SETTINGS := $(CURDIR) | $(TORCH_REQUIREMENT) | CUDA $(DML_BUILD_CUDA) | $(CXX)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(VENV)/.stamp-build ## the environment and the extension, in place

demo: $(VENV)/.stamp-build $(VENV)/.stamp-demo ## the main job: train on Han characters, evaluate on unseen ones
	$(PY) -m dml_kernels train $(DEMO_ARGS)

test: $(VENV)/.stamp-build $(VENV)/.stamp-test ## the tests, without the slow ones
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: $(VENV)/.stamp-build $(VENV)/.stamp-test $(VENV)/.stamp-triton ## the tests, with the slow ones and Triton's; then again on PyTorch's CUDA build (several GB)
	DML_FUZZ=10 $(PYTEST) $(TEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) --dist loadfile tests/backends/triton $(TEST_ARGS)
	.ci/cuda-stack --all $(TEST_ARGS)

test-triton: $(VENV)/.stamp-build $(VENV)/.stamp-test $(VENV)/.stamp-triton ## the Triton kernels, interpreted and compiled ahead of time
	TRITON_INTERPRET=1 $(PYTEST) --dist loadfile -m "not slow" tests/backends/triton $(TEST_ARGS)

kernel-report: $(VENV)/.stamp-build $(VENV)/.stamp-triton ## registers, shared memory, instructions, predicted times of the Triton kernels
	$(PY) -m dml_kernels.backends.triton.tools.report $(REPORT_ARGS)

bench: $(VENV)/.stamp-build $(VENV)/.stamp-test ## time and memory of ours and of other losses, a table and a plot
	$(PY) -m bench $(BENCH_ARGS)

bench-refresh: $(VENV)/.stamp-build $(VENV)/.stamp-test ## seconds of a refresh of the cluster index, compared with faiss alone
	$(PY) -m bench.refresh $(BENCH_ARGS)

bench-losses: $(VENV)/.stamp-build $(VENV)/.stamp-test ## a step of every drop-in loss, compared with pytorch-metric-learning; the table of docs/losses.md
	$(PY) -m bench.drop_in $(BENCH_ARGS)

# No set-up: any interpreter with torch for this GPU serves, and the script builds the extension for it.
GPU_PYTHON ?= python3
gpu: ## every proof and figure that needs a GPU, with GPU_PYTHON (python3); continues an interrupted run
	$(GPU_PYTHON) -m bench.gpu $(GPU_ARGS)

lint: $(VENV)/.stamp-build $(VENV)/.stamp-dev $(VENV)/.stamp-test ## ruff, clang-format and mypy, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(PY) -m mypy

format: $(VENV)/.stamp-dev ## lay out Python and C++ as lint wants them
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

sanitize: $(VENV)/.stamp-test ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	.ci/sanitize $(TEST_ARGS)

cuda-stack: ## build and try the package against PyTorch's CUDA build, no GPU needed (several GB)
	.ci/cuda-stack $(TEST_ARGS)

clean: ## remove builds and caches, keep the environment
	rm -rf build dist *.egg-info dml_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.stamp-build
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# Set-up. A stamp is older than what it was made from when the step must run again.
$(VENV)/.stamp-venv: .ci/bootstrap
	@.ci/bootstrap $(VENV)
	@touch $@

$(VENV)/.stamp-settings: FORCE | $(VENV)/.stamp-venv
	@cmp -s $@ - <<< '$(SETTINGS)' || cat > $@ <<< '$(SETTINGS)'

$(VENV)/.stamp-torch: requirements/torch.txt requirements/build.txt $(VENV)/.stamp-venv $(VENV)/.stamp-settings
	@echo "installing $(TORCH_REQUIREMENT) and requirements/build.txt"
	@$(PIP) install $(TORCH_REQUIREMENT) -r requirements/build.txt | sed '/already satisfied/d'
	@touch $@

$(VENV)/.stamp-test: requirements/demo.txt
$(VENV)/.stamp-test $(VENV)/.stamp-demo $(VENV)/.stamp-dev $(VENV)/.stamp-triton: $(VENV)/.stamp-%: requirements/%.txt $(VENV)/.stamp-torch
	@echo "installing requirements/$*.txt"
	@$(PIP) install -q -r requirements/$*.txt
	@touch $@

# The whole package when its metadata, setup.py or torch changed; only what changed in csrc otherwise.
$(VENV)/.stamp-build: pyproject.toml setup.py $(CSRC) $(VENV)/.stamp-torch
	@echo "building the extension (log: $(VENV)/build.log)"
	@if [ -n "$(filter-out $(CSRC),$?)" ]; then $(PIP) install -v --no-build-isolation --no-deps -e .; \
	  else $(PY) setup.py build_ext --inplace; fi > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@sed -n 's/^ *\(dml_kernels: .*\)/\1/p' $(VENV)/build.log | sort -u
	@touch $@
