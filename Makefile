# Everything here makes .venv when it is absent and needs nothing but Python 3.11+ and pip.
PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS := $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

.DEFAULT_GOAL := help
.PHONY: help demo test test-integrations nightly test-containers lint format bench release-check clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# The stamp is younger than what it was made from, so an edit of the dependencies installs again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once; a few minutes on a slow line)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## train twice, watch it live in the browser (ONCE=1 ends after the findings, PORT=n)
	@$(BIN)/python -m brn_core.worker.demo $(DEMO_ARGS)

test: lint  ## lint, types, import contracts and tests; CPU only, no Docker
	@$(BIN)/python -m pytest -m "not containers" --numprocesses 2 --dist loadfile $(ARGS)

test-integrations: .venv/.installed  ## install Lightning, transformers and Triton into .venv, run what needs them
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[integrations]'
	@BRN_TEST_INTEGRATIONS=1 $(BIN)/python -m pytest tests/brn_core/test_integrations.py tests/brn_core/test_fused.py $(ARGS)

nightly: .venv/.installed  ## kill the service a hundred times while ranks send, and count rows (some minutes)
	@BRN_TEST_KILLS=100 $(BIN)/python -m pytest tests/service/test_durability.py $(ARGS)

test-containers: .venv/.installed  ## build the images, bring the compose file up, see rows arrive
	@$(BIN)/python -m pytest -m containers --timeout 1200 $(ARGS)

lint: .venv/.installed  ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: .venv/.installed  ## let ruff format and fix what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: .venv/.installed  ## measure, a few hours; tables land in benchmarks/results (not the soak: benchmarks/soak.py)
	@for name in layer recording ingest query pages verdicts; do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py --save || exit 1; done

release-check: .venv/.installed  ## version, links, wheel, sdist; date, known vulnerabilities (OFFLINE=1: not these two)
	@$(BIN)/python -m pytest -q tests/test_release.py
	@$(BIN)/python .ci/release_check.py $(if $(OFFLINE),--offline)

clean:  ## remove what make made: .venv, caches, the demo's store
	rm -rf .venv .demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
