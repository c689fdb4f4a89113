# Each target works first in a fresh clone: .venv is built when it is missing, half-built or out of date.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Tests run in as many processes, of one thread each.
JOBS ?= 2

.DEFAULT_GOAL := env
.PHONY: help env demo demo-det test test-fast lint format docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

env: ## build .venv, or do nothing where it is complete
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: env ## distillation on handwritten digits, with a table and curves: 5 minutes of CPU time
	$(RUN) tools/demo.py

demo-det: env ## the same for detectors: 15 minutes of CPU time
	$(RUN) tools/demo_det.py

test: env ## all tests; JOBS=8 in eight processes
	$(RUN) -m pytest -n $(JOBS) --dist worksteal

test-fast: env ## those that take seconds
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

lint: env ## check the style, with ruff
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: env ## fix what ruff can fix
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# A warning, such as a broken link, is an error.
docs: env ## build the pages: site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Pages: site/index.html"

clean: ## remove .venv, output and what was built
	rm -rf $(VENV) output build site *.egg-info .pytest_cache .hypothesis .ruff_cache
