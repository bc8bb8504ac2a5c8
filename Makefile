# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.PHONY: help demo test test-long faults simulate test-slurm test-vllm test-rl test-compat test-container check types audit lock release-check docs format venv clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMP)  ## the whole story on this machine; ends with a report
	$(BIN)/asft demo $(ARGS)

test: $(STAMP)  ## the suite: every feature and refusal (about 40 minutes on two cores)
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(ARGS)

test-long: $(STAMP)  ## what make test leaves out: further layouts, seeds, recipes, suites and blocks of the documentation (an estimated hour on two cores)
	$(BIN)/python -m pytest -m long $(ARGS)

faults: $(STAMP)  ## the short form of the fault campaign: kills, full disks, damaged files (7 minutes on two cores); docs/faults.md has the long one
	$(BIN)/python tools/fault_campaign.py --short --out runs/faults $(ARGS)

test-slurm: $(STAMP)  ## the tests on a real Slurm, at most 8 minutes; installs Debian's packages of it where it may
	tools/test_slurm $(BIN)/python $(ARGS)

simulate: $(STAMP)  ## every recipe at full size without data against the planner; written into benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python tools/simulate_recipes.py --out benchmarks/results $(ARGS)

test-vllm: $(STAMP)  ## real vLLM (its build for CPUs, in .venv-vllm) against transformers, three minutes once that is installed
	tools/test_vllm $(BIN)/python $(ARGS)

test-rl: $(STAMP)  ## a few steps of TRL's GRPO on an exported model, in a venv of its own (1 minute, and 2 to 4 to install)
	tools/test_rl $(BIN)/python $(ARGS)

test-compat: $(STAMP)  ## trains at TP2 x PP2 on the other pairs of NeMo and Megatron-core that are promised (10 minutes)
	$(BIN)/python tools/compat_check.py $(ARGS)

test-container: $(STAMP)  ## builds the Dockerfile on a base made here and tries the image; root on Debian (15 minutes, 12 GB for a while)
	tools/container_check $(ARGS)

check: $(STAMP)  ## the fast checks: style, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config pyproject.toml

types: $(STAMP)  ## pyright (a minute)
	$(BIN)/pyright --threads 2 $(ARGS)

audit: $(STAMP)  ## bandit on the code; pip-audit on the pins, where it is installed and its service answers
	tools/audit $(BIN)/python

lock:  ## hashes of the pins, after a change of requirements (needs uv)
	tools/lock

release-check: $(STAMP)  ## a release without publishing: the wheel in an empty environment, its demo included (10 minutes)
	tools/release_check $(BIN)/python

docs: $(STAMP)  ## the documentation site into site/, strict: a warning fails (seconds)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)  ## style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(STAMP)  ## the pinned environment in .venv

$(STAMP): requirements/base.txt requirements/dev.txt requirements/hashes/main.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed (the pins are for it); found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing about 240 pinned packages (3.5 GB on disk, 2 to 10 minutes) ..."
	tools/install $(BIN)/python main
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

clean:  ## removes runs and caches, keeps .venv
	rm -rf runs site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
