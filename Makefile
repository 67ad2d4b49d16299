# make demo   quantize the bundled model, generate with it; pictures and report in demo/
# make test   every test this machine can run (those marked gpu where there is a GPU)
#
# Both work in .venv, which .ci/environment.py makes: over PYTHON where that has torch, else with a
# pinned torch of its own. LRQ_BUILD_CUDA, LRQ_CUDA_ARCHS, CUDA_HOME: see setup.py.

PYTHON ?= python3
PYTEST_ARGS ?=
# One process a core; tests/conftest.py says which files are theirs alone. In their own order:
# xdist's puts files of few tests last, and those are the long ones.
PYTEST_WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) --maxprocesses 16 --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)
VENV_PYTHON := .venv/bin/python
# Its script is in bin of the environment below when it came from there.
CLANG_FORMAT := $(VENV_PYTHON) -c "import clang_format; clang_format.clang_format()"

# Threads that spin while they wait cost more than they bring when the cores are few or busy.
export OMP_WAIT_POLICY ?= passive

# Tests start some thirty processes. Where Python may leave no byte code beside the sources, each
# would compile torch and diffusers anew, 8 s: it goes into .venv instead.
ifneq ($(PYTHONDONTWRITEBYTECODE),)
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.venv/bytecode
endif

.DEFAULT_GOAL := help
.PHONY: help build wheel demo test test-gpu lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo 'make test-gpu | lint | format | build | wheel | clean'

# Done again when the list of what is needed changes.
.venv/lrq-installed: pyproject.toml .ci/environment.py
	$(PYTHON) .ci/environment.py create
	$(VENV_PYTHON) .ci/environment.py install test
	$(VENV_PYTHON) setup.py --quiet build_ext --inplace
	$(VENV_PYTHON) -m pip install -qq --no-build-isolation --no-deps --editable .
	@touch $@

.venv/lrq-lint: .venv/lrq-installed
	$(VENV_PYTHON) .ci/environment.py install lint
	@touch $@

# ninja decides what is out of date: half a second when nothing is.
build: .venv/lrq-installed
	@$(VENV_PYTHON) setup.py --quiet build_ext --inplace

# For this CPython and any torch from 2.10 on, in dist/.
wheel: .venv/lrq-installed
	$(VENV_PYTHON) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

demo: build
	$(VENV_PYTHON) -m lrq_quant demo --out demo

test: build
	$(PYTEST)

test-gpu: build
	$(PYTEST) -m gpu

SOURCES := lrq_kernels lrq_quant tests benchmarks setup.py .ci/environment.py
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

lint: .venv/lrq-lint
	$(VENV_PYTHON) -m ruff check $(wildcard $(SOURCES))
	$(VENV_PYTHON) -m ruff format --check $(wildcard $(SOURCES))
	$(VENV_PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)

format: .venv/lrq-lint
	$(VENV_PYTHON) -m ruff check --fix $(wildcard $(SOURCES))
	$(VENV_PYTHON) -m ruff format $(wildcard $(SOURCES))
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

clean:
	rm -rf build dist demo *.egg-info .venv lrq_kernels/*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
