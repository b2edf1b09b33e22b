# The project's commands. Each does all of its own set-up, in .venv, and a second run repeats nothing that still holds.
# Needed: Python >= 3.10 with its headers, a C++20 compiler, make. Everything else comes from the package registry.
#
#   make build TORCH="torch==2.11.0"    another torch (remembered until `make clean`)
#   make build PYTHON=python3.12        another Python
#   make build CXX=clang++-16           another compiler
#   make build FASTRNN_NATIVE=0         pure Python; see docs/compatibility.md for this and FASTRNN_CUDA

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input

PYTHON ?= python3
TORCH_DEFAULT := torch==2.13.0
ifeq ($(origin TORCH),undefined)
TORCH := $(or $(shell cat $(VENV)/.torch-chosen 2>/dev/null),$(TORCH_DEFAULT))
endif
# make has a CXX of its own (g++); only one that was asked for is passed on.
ifneq ($(filter command line environment,$(origin CXX)),)
export CXX
endif
export FASTRNN_NATIVE FASTRNN_CUDA FASTRNN_CUDA_ARCH MAX_JOBS

BUILD_SOURCES := $(shell find csrc tools -type f -not -name '*.pyc' 2>/dev/null) \
  CMakeLists.txt setup.py pyproject.toml fastrnn/__init__.py
CXX_SOURCES = $(shell find csrc tests/cpp tests/cuda_sim bench/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHON_SOURCES := fastrnn tests bench examples tools setup.py
PYTEST := $(PY) -m pytest -n auto --maxprocesses=4 --durations=12

# $(call remember,VALUE): the target changes, and so its dependents run, only when VALUE does.
remember = printf '%s\n' '$(1)' | cmp -s - $@ || printf '%s\n' '$(1)' > $@

.PHONY: help build bench bench-full test test-full race lint test-cpp test-python cuda-link format clean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: $(VENV)/.built ## Build the package into .venv

bench: $(VENV)/.bench ## Train a language model with torch.nn and with fastrnn, then time every named case (bench/out/)
	$(PY) -m bench all

bench-full: $(VENV)/.dev ## Time all cases, threads and dtypes against every peer and the machine's limits (half an hour)
	$(PY) -m bench full

test: lint test-cpp test-python ## Check format and lint, run the C++ and the Python tests on both backends

# Leaks are not looked for: torch and OpenMP keep what they allocate once, and not every container lets the detector run.
test-full: $(VENV)/.dev ## Run what is slower: slow tests, the packages, the C++ tests under sanitizers
	$(PYTEST) -m slow
ifneq ($(FASTRNN_NATIVE),0)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(PY) tools/native.py tests --sanitize
endif

# Needs nvcc, but no GPU and no CUDA torch: one is fetched (500 MB) and unpacked below build/.
cuda-link: $(VENV)/.dev ## Compile and link the CUDA half against a CUDA torch
	$(PY) tools/native.py cuda-link

race: $(VENV)/.dev ## Run the CUDA kernels on the CPU under ThreadSanitizer
	$(PYTEST) -m slow tests/test_cuda_race.py

lint: $(VENV)/.dev ## Check format, lint and types
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

test-cpp: $(VENV)/.dev ## Build and run the C++ tests
ifneq ($(FASTRNN_NATIVE),0)
	$(PY) tools/native.py tests
endif

# The second run: the tests that choose no backend themselves, as on a machine without the native library. The CUDA
# sources have none.
test-python: $(VENV)/.dev ## Run the pytest suite on both backends
	$(PYTEST)
	FASTRNN_BACKEND=python $(PYTEST) -k "not native and not python" \
	  --ignore-glob='*/test_cuda*.py' --ignore=tests/test_gpu_check.py --ignore=tests/test_activations.py

format: $(VENV)/.dev ## Rewrite the sources in the house's format
	$(BIN)/ruff check --fix-only --quiet $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean: ## Delete .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info fastrnn/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Set-up: stamps in .venv ------------------------------------------------------------------------------------------

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "fastrnn: $(PYTHON) not found: apt install python3 python3-venv python3-dev, or make PYTHON=/path/to/python3"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastrnn: Python 3.10 or newer is needed, and $(PYTHON) is older: make PYTHON=/path/to/python3"; exit 1; } >&2
	@$(PYTHON) tools/native.py check
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.python-wanted: FORCE | $(VENV)/.made
ifneq ($(filter command line environment,$(origin PYTHON)),)
	@asked=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:3], sep=".")') && \
	have=$$($(PY) -c 'import sys; print(*sys.version_info[:3], sep=".")') && \
	{ test "$$asked" = "$$have" || { \
	  echo "fastrnn: .venv holds Python $$have, PYTHON=$(PYTHON) is $$asked: run make clean first" >&2; exit 1; }; }
endif
	@test -e $@ || touch $@

$(VENV)/.torch-wanted: FORCE | $(VENV)/.made
	@$(call remember,$(TORCH))

$(VENV)/.build-wanted: FORCE | $(VENV)/.made
	@$(call remember,FASTRNN_NATIVE=$(FASTRNN_NATIVE) FASTRNN_CUDA=$(FASTRNN_CUDA) FASTRNN_CUDA_ARCH=$(FASTRNN_CUDA_ARCH) CXX=$(CXX) CXXFLAGS=$(CXXFLAGS))

$(VENV)/.tools: | $(VENV)/.made
	$(PIP) install -q "setuptools>=77" "cmake>=3.24,<5" "ninja>=1.11,<2" "pybind11>=3,<4"
	@touch $@

$(VENV)/.torch: $(VENV)/.torch-wanted | $(VENV)/.made
	$(PIP) install $(TORCH) "numpy>=1.26,<3"
	@if test '$(TORCH)' = '$(TORCH_DEFAULT)'; then rm -f $(VENV)/.torch-chosen; \
	else echo '$(TORCH)' > $(VENV)/.torch-chosen; fi
	@touch $@

# Built twice in name only: the first run shows the compiler at work, pip then finds nothing left to compile.
$(VENV)/.built: $(BUILD_SOURCES) $(VENV)/.tools $(VENV)/.torch $(VENV)/.build-wanted $(VENV)/.python-wanted
	$(PY) tools/native.py build
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.torch | $(VENV)/.built
	$(PIP) install -q --no-build-isolation -e ".[bench]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch | $(VENV)/.built
	$(PIP) install -q --no-build-isolation -e ".[test,bench,examples,dev]"
	@touch $@
