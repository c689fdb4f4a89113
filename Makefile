# Each target works first in a fresh clone: .venv is built when it is missing, half-built or out of date.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Tests run in as many processes, of one thread each.
JOBS ?= 2

.PHONY: env demo demo-det test test-fast lint format docs clean

env:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: env
	$(RUN) tools/demo.py

demo-det: env
	$(RUN) tools/demo_det.py

test: env
	$(RUN) -m pytest -n $(JOBS) --dist worksteal

test-fast: env
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

lint: env
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: env
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# A warning, such as a broken link, is an error.
docs: env
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "Pages: site/index.html"

clean:
	rm -rf $(VENV) output build site *.egg-info .pytest_cache .ruff_cache
