# `make demo` and `make test` do all their own set-up. PYTHON picks the interpreter (3.10 to 3.13).
PYTHON ?= $(shell for v in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$v -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$v; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNNERS ?= 5
URLS ?= 100
HAR ?=
OWN_TOKENS ?=

SHELL := /bin/bash
# Images for containers like to set it: every process of the demo and of the tests would compile libp2p anew.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help setup demo test simulate fuzz mutants docs coverage lint typecheck bench soak lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the virtual environment

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python 3.10 to 3.13 is needed: install python3, or name one with PYTHON=...' >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo 'A C compiler is needed to build libp2p: install gcc (Debian: apt-get install gcc python3-dev; macOS: xcode-select --install)' >&2; exit 1; }
	@printf '#include <gmp.h>\n' | cc -E - >/dev/null 2>&1 || { echo "GMP's headers are needed to build libp2p: install libgmp-dev (Debian: apt-get install libgmp-dev; Fedora: dnf install gmp-devel; macOS: brew install gmp)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'The venv module is needed: install python3-venv (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@echo 'Setting up $(VENV) (once; about half a minute) ...'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(sed -nE 's/^(uv==[^ ;]+).*/\1/p' requirements.lock)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: $(READY) ## five runners share what one has paid for (RUNNERS=, URLS=, HAR=file, OWN_TOKENS=1)
	@$(BIN)/p2pcache demo --runners $(RUNNERS) --urls $(URLS) $(if $(HAR),--har $(HAR)) $(if $(OWN_TOKENS),--own-tokens)

test: $(READY) lint typecheck ## lint, types and every test
	@# The longest files first. Real processes have real deadlines: what fails among four at a time has to pass alone.
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder || { echo 'Once more, alone, what has failed:'; \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none; }

simulate: $(READY) ## ten thousand schedules of the simulated fleet (SCHEDULES=)
	@SCHEDULES=$(or $(SCHEDULES),10000) $(BIN)/python -m pytest --timeout 3600 tests/simulation

fuzz: $(READY) ## a million hostile frames, a hundred thousand of all else that others write (RUNS=), and floods
	@status=0; for name in frames admission entries registry settings fields door; do \
		runs=$(or $(RUNS),100000); [ $$name != frames ] || runs=$$((runs * 10)); \
		$(BIN)/python -m tests.fuzz $$name --runs $$runs 2>/dev/null | grep -E "FOUND|runs in" ; \
		[ $${PIPESTATUS[0]} -eq 0 ] || status=1; \
	done; \
	FLOOD_SECONDS=10 $(BIN)/python -m pytest tests/integration/test_attacks.py -k "flood or bounded" || status=1; \
	exit $$status

mutants: $(READY) ## take each defence away, and see its test fail
	@$(BIN)/python -m tests.mutants

coverage: $(READY) ## every test, one after another, and which lines they reach
	@$(BIN)/coverage run -m pytest
	@$(BIN)/coverage report --skip-covered | tail -n 40

lint: $(READY) ## ruff and the floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

typecheck: $(READY) ## mypy, strict
	@$(BIN)/mypy

docs: $(READY) ## the documentation as a site, into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -f docs/site/mkdocs.yml 2>&1 | grep -v INFO; test $${PIPESTATUS[0]} -eq 0 && echo 'site/index.html'

bench: $(READY) ## all that is measured, beside the rivals; docs/benchmarks.md is made of it
	@$(BIN)/python -m benchmarks

soak: $(READY) ## twenty minutes of load with writes, restarts and kills
	@$(BIN)/python -m benchmarks soak

lock: $(READY) ## pin every dependency anew
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.10 \
		--all-extras --group dev pyproject.toml -o requirements.lock

clean: ## remove what the targets made
	@rm -rf $(VENV) .coverage .mypy_cache .ruff_cache .hypothesis .import_linter_cache .pytest_cache
