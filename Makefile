# make help says what there is.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c pass 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
FAIRSEQ := fairseq-fixed==0.12.3.1
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/normexp

.DEFAULT_GOAL := help
.PHONY: help install install-tests demo fast test test-all lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {sub("%", "PART", $$1); printf "  make %-14s %s\n", $$1, $$2}' \
		$(MAKEFILE_LIST)

install: $(VENV)/.installed  ## environment in .venv: PyTorch, fairseq, normexp; does nothing when up to date

INSTALL := PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" FAIRSEQ="$(FAIRSEQ)" CACHE="$(CACHE)" \
	bash scripts/install.sh

$(VENV)/.installed: pyproject.toml Makefile scripts/install.sh
	@$(INSTALL)
	@touch $@

# What only the tests need is larger than what the demo needs.
install-tests: $(VENV)/.installed-tests  ## adds what the tests need, among it Triton and transformers

$(VENV)/.installed-tests: $(VENV)/.installed
	@$(INSTALL) dev
	@touch $@

demo: install  ## train LN, BN, PN-V and PN on two toy tasks and print the tables (about 5 minutes, 2 cores)
	@$(BIN)/python scripts/demo.py
	@$(BIN)/python scripts/report.py --results results/demo --console-only

# Whole files go to one process, which keeps what the tests of a file share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -rs  # -rs: why tests are skipped
BY_FILE := --dist loadfile --no-loadscope-reorder
FAST := $(addprefix tests/norms/test_,golden.py references.py arguments.py known_layers.py) \
	tests/config tests/runs/test_records.py tests/test_imports.py

fast: install-tests  ## the tests to run after every change: layers, configs, records, imports (40 seconds)
	$(PYTEST) --dist worksteal -m "not thorough" $(FAST)

test-%: install-tests  ## tests of a part, e.g. test-norms: PART is a folder of tests/
	$(PYTEST) $(BY_FILE) -m "not thorough" tests/$*

test-plugin: test-fairseq_plugin ;

test: install-tests  ## all tests but the thorough ones (15 minutes, 2 cores)
	$(PYTEST) $(BY_FILE) -m "not thorough"

test-all: install-tests  ## all tests
	$(PYTEST) $(BY_FILE)

lint: install-tests  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and everything that git ignores except data/ and results/
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache outputs multirun
