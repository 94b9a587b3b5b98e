# make setup | quickstart | test | matrix | grid | methods | chaos | lint | schema | bench | bench-gpu | clean
#
# Variables you may set, as in `make quickstart RANKS=1`:
#   PYTHON           the interpreter that makes .venv          (default: the first Python >= 3.11 found)
#   TORCH            the requirement for PyTorch               (default: by whether a GPU is here, see below)
#   TORCH_CPU_INDEX  an index that holds CPU builds of PyTorch (default: pip's own configuration)
#   RANKS            ranks of the quickstart                   (default: the number of GPUs, or 2 without one)
#   WORKERS          files that `test` runs at a time          (default: 2; 0: one after the other, in one process)
#   PYTEST_ARGS      more arguments for pytest, for instance PYTEST_ARGS='-k config -x'
#   METHODS_ARGS     of `methods`, for instance METHODS_ARGS='--methods lora,dora --strategies single,fsdp2'
#   CHAOS_ARGS       of `chaos`, for instance CHAOS_ARGS='--seed 1 --r1 20 --r2 0 --r6 0'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.setup-done
PEERS := .venv-bench
PIP   := $(BIN)/python -m pip --disable-pip-version-check --no-input

# How many NVIDIA GPUs are here; where the driver's tool is missing, count the device files.
GPUS := $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); \
	[ "$${n:-0}" -gt 0 ] || n=$$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | wc -l); echo $$n)
WORKERS ?= 2
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

# PyTorch's usual Linux build brings gigabytes of CUDA. Without a GPU the CPU build, `+cpu`, is asked for
# by name; constraints.txt pins the same version for both. The CPU build is not on every package index: say
# where it is with TORCH_CPU_INDEX (PyTorch's installation page names theirs), or have pip configured for it;
# if it cannot be found, the usual build is installed instead, and that is said.
# On a login node without a GPU, for jobs on nodes with one: make setup TORCH=torch==2.13.0
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= torch==$(TORCH_VERSION)$(if $(filter 0,$(GPUS)),+cpu)

# The benchmarks this machine can run: tests/bench/gpu_*.py need a GPU, files that begin with _ are no benchmarks.
BENCH_GPU := $(sort $(wildcard tests/bench/gpu_*.py))
BENCH_CPU := $(sort $(filter-out $(BENCH_GPU) tests/bench/_%.py,$(wildcard tests/bench/*.py)))

.PHONY: help setup quickstart test resources matrix grid methods chaos lint schema bench bench-gpu clean

help:
	@sed -n '1,/^$$/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
			"$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
			echo "setup: making $(VENV) with $$(command -v "$$python")"; \
			"$$python" -m venv $(VENV); \
			break; \
		done; \
		if [ ! -x $(BIN)/python ]; then \
			echo "setup: no Python >= 3.11 with venv was found (Debian: apt-get install python3-venv)." \
				"Name one: make setup PYTHON=/path/to/python3.11" >&2; \
			exit 1; \
		fi; \
	fi
	@echo "setup: installing $(TORCH)"
	@if ! $(PIP) install -qq $(if $(TORCH_CPU_INDEX),$(if $(findstring +cpu,$(TORCH)),--index-url $(TORCH_CPU_INDEX))) \
			"$(TORCH)"; then \
		case "$(TORCH)" in *+cpu) ;; *) exit 1 ;; esac; \
		echo "setup: no CPU build of PyTorch there (TORCH_CPU_INDEX can name an index that has it);" \
			"installing the usual build, which may be large" >&2; \
		$(PIP) install -qq "torch==$(TORCH_VERSION)"; \
	fi
	@echo "setup: installing shardtune and what it needs"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
	@echo "setup: done"

# The launcher finds its compiler tools (ninja) on PATH. Without --num_gpus it would count NUMA nodes on a CPU.
quickstart: setup
	PATH="$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) launch/train.py --config configs/quickstart.yaml

# WORKERS files at a time; the ops once more with their kernels interpreted. A part may have nothing of what PYTEST_ARGS
# chooses, pytest's exit code 5, but not both.
test: setup
	@export PATH="$(BIN):$$PATH"; \
	part() { $(BIN)/python -m pytest -n $(WORKERS) "$$@" $(PYTEST_ARGS) && code=0 || code=$$?; codes="$${codes:-} $$code"; }; \
	part tests; TRITON_INTERPRET=1 part tests/ops; \
	ran=5; for code in $$codes; do \
		if [ $$code -ne 0 ] && [ $$code -ne 5 ]; then exit $$code; elif [ $$code -eq 0 ]; then ran=0; fi; \
	done; exit $$ran

# What each kernel takes on each GPU, for the table that a test compares with; RESOURCES_ARGS: parts of names.
resources: setup
	$(BIN)/python tests/ops/resources.py $(RESOURCES_ARGS)

# Every strategy with every kind of model, on one and on two ranks, by every launcher; `test` runs a sample of it.
matrix: setup
	PATH="$(BIN):$$PATH" SHARDTUNE_WHOLE_MATRIX=1 $(BIN)/python -m pytest tests/test_launchers.py $(PYTEST_ARGS)

# The same run under every layout: ranks, micro-batches, batchings and strategies; `test` runs a sample of it.
grid: setup
	PATH="$(BIN):$$PATH" $(BIN)/python tests/grid.py

# Every tuning method on a small T5 and a small Llama, alone and under every kind of strategy; `test` runs a sample.
methods: setup
	PATH="$(BIN):$$PATH" $(BIN)/python tests/methods.py $(METHODS_ARGS)

# Kills, damages and starves runs, hundreds of times, and compares them with runs that nothing happened to; half an hour.
chaos: setup
	PATH="$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py $(CHAOS_ARGS)

# All of them, even after one has failed.
SCRIPTS = $(wildcard .ci/run slurm/*.sbatch slurm/*.sh launch/*.sh tests/*.sh)
lint: setup
	@failed=0; \
	run() { echo "$$*"; PATH="$(BIN):$$PATH" "$$@" || failed=1; }; \
	run ruff check .; \
	run ruff format --check .; \
	run pyright; \
	run lint-imports --no-logo; \
	for script in $(SCRIPTS); do run bash -n $$script; done; \
	run shellcheck $(SCRIPTS); \
	exit $$failed

# What editors and readers know of the config's keys, from their types.
schema: setup
	$(BIN)/python -m shardtune.schema configs

# Each benchmark prints one JSON line. A failing one does not stop the others, but make fails in the end.
define run_benchmarks
	@failed=0; \
	for script in $(1); do \
		echo "bench: $$script" >&2; \
		PATH="$(BIN):$$PATH" $(BIN)/python "$$script" || { echo "bench: $$script failed" >&2; failed=1; }; \
	done; \
	exit $$failed
endef

# Peers of the benchmarks live in an environment of their own, which sees what is in $(VENV); a benchmark whose peer is
# missing says so. Those of requirements-gpu.txt are only for a GPU; one that cannot be installed leaves out itself.
$(PEERS)/.setup-done: $(STAMP) tests/bench/requirements.txt tests/bench/requirements-gpu.txt
	@echo "bench: installing the peers of the benchmarks into $(PEERS)" >&2
	@rm -rf $(PEERS)
	@$(BIN)/python -m venv --without-pip $(PEERS)
	@packages() { "$$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	echo "import site; site.addsitedir('$$(packages $(CURDIR)/$(VENV))')" > "$$(packages $(PEERS))/of_venv.pth"; \
	install() { $(PIP) --python $(PEERS)/bin/python install -qq --no-deps "$$@"; }; \
	$(if $(filter-out 0,$(GPUS)),grep -v '^#' tests/bench/requirements-gpu.txt | while read -r peer _; do \
		install "$$peer" || echo "bench: $$peer could not be installed; figures that need it are null" >&2; \
	done; )if install -r tests/bench/requirements.txt; then \
		touch $@; \
	else \
		echo "bench: they could not be installed; figures that need them are null" >&2; \
		$(if $(filter-out 0,$(GPUS)),,rm -rf $(PEERS);) \
	fi

bench: setup $(PEERS)/.setup-done
	$(if $(BENCH_CPU),,@echo "bench: there are no benchmarks for a CPU in tests/bench yet")
	$(if $(filter 0,$(GPUS)),@echo "bench: left out for want of a GPU: $(notdir $(BENCH_GPU))" >&2)
	$(call run_benchmarks,$(BENCH_CPU))
	$(if $(filter-out 0,$(GPUS)),@$(MAKE) bench-gpu)

# First whether all ops are right at real sizes; only then what is fast. Results are kept in tests/bench/results.
bench-gpu: setup $(PEERS)/.setup-done
	$(if $(filter 0,$(GPUS)),@echo "bench-gpu: there is no NVIDIA GPU here" >&2; exit 1)
	@python=$(PEERS)/bin/python; [ -x "$$python" ] || python=$(BIN)/python; \
	PATH="$(BIN):$$PATH" "$$python" tests/bench/_write_results.py

# Caches and build outputs, not the runs and not $(VENV).
clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
