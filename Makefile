# make demo     train a SimCLR encoder on Fashion-MNIST, judge it and draw pictures (a few minutes)
# make test     all tests                          make build     only install and build
# make bench    all benchmarks against their peers, or one: make bench OP=info_nce
# make lint     ruff, clang-format, mypy          make format    what they can repair themselves
# make test-cuda    on a machine with a GPU: tests and times of the CUDA kernels on it, into one file of results
# make test-sanitize    the tests of the ops with AddressSanitizer and UBSan
# make clean    remove everything that was made here, .venv included
#
# The first of them makes .venv, installs torch and the test tools into it and builds the extension; later ones rebuild what
# changed. To use an environment of yours that has torch already: make test VENV=path/to/it
#
# Variables: PYTHON (3.10 or newer), VENV, TORCH (what pip installs where torch is missing), OP, SSLFAST_CUDA=auto|on|off.

VENV  ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
OP    ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)

BIN     := $(abspath $(VENV))/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
INSTALLED := $(VENV)/.sslfast-installed
READY     := $(VENV)/.sslfast-ready
export PATH := $(BIN):$(PATH)

.PHONY: help build demo test test-cuda test-sanitize bench lint format clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

build: $(READY)

demo: $(READY)
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Fetching Fashion-MNIST: apt-get install dataset-fashion-mnist"; \
		apt-get install -qq -y dataset-fashion-mnist >/dev/null 2>&1 || \
		{ apt-get update -qq && apt-get install -qq -y dataset-fashion-mnist; } >/dev/null 2>&1 || true; fi
	@if $(BIN)/python -c 'from sslfast.training import data; data.load("fashion-mnist", "train")'; then \
		$(BIN)/sslfast simclr --data fashion-mnist; \
	else \
		echo; echo "Fashion-MNIST could not be had (above); the demo goes on with the digits of scikit-learn."; echo; \
		$(BIN)/sslfast simclr --data digits --batch-size 128 --epochs 20; fi

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	@mkdir -p build
	$(BIN)/python -m pytest benchmarks/$(if $(OP),bench_$(OP).py) --benchmark-disable-gc --benchmark-quiet \
		--benchmark-json=build/benchmark.json $(ARGS)
	$(BIN)/python benchmarks/report.py build/benchmark.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

# All of it goes on after a failure; what it printed is in $(CUDA_RESULTS), to be read, kept or sent.
CUDA_RESULTS := benchmarks/results/cuda.txt
CUDA_STEPS := "-m sslfast info" "-m sslfast selftest" "-m pytest -q -m cuda" "-m pytest -q tests/test_cuda_build.py" \
              "benchmarks/cuda_times.py"
test-cuda: $(READY)
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("torch finds no CUDA device on this machine")'
	@bash -o pipefail -c '{ for step in $(CUDA_STEPS); do echo; echo "== python $$step"; \
		$(BIN)/python $$step || failed=1; done; exit $${failed:-0}; } 2>&1 | tee $(CUDA_RESULTS)'

# A second copy of the package in build/sanitized, so that the normal build stays as it is.
test-sanitize: $(READY)
	SSLFAST_CUDA=off SSLFAST_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib build/sanitized
	cd tests && PYTHONPATH=$(abspath build/sanitized) \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -p no:cacheprovider --capture=sys -m "not slow and not emulated" $(ARGS) $(notdir $(wildcard $(patsubst \
		csrc/ops/%.h,tests/test_%.py,$(wildcard csrc/ops/*.h)))) test_threads.py test_odd_tensors.py test_fuzz.py

clean:
	rm -rf .venv build dist *.egg-info sslfast/_C*.so sslfast/_built_for.py
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.10 or newer with the venv module was found. Install one (Debian:" \
		"apt-get install python3 python3-venv python3-dev) or name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The requirements and the package itself, which builds the extension for the first time.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH) into $(VENV)"; $(PIP) $(TORCH); }
	@echo "Installing what else it needs and building the extension: some minutes the first time"
	@$(PIP) "setuptools>=77" "pybind11>=2.13" "cmake>=3.25" ninja
	@$(PIP) --no-build-isolation -e '.[test,lint]'
	@touch $@

$(READY): $(INSTALLED) $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
