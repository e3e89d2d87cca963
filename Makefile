# `make quickstart`: set up, train versions of a tiny model on real text under three paradigms, report.
# `make test`:       set up, check style, types and prose, run the tests.
# `make test-fast`:  the tests that start no process, in a few minutes.
# `make docs`:       set up, build the documents as a site; fails at a link or an anchor that leads nowhere.
# `make setup`:      set up alone, in .venv (PYTHON=… names an interpreter).

PLAN ?= examples/quickstart/plan.yaml
# A file at a time; more workers than two cores, as many tests wait (for a cluster, a kill, a time limit).
PYTEST_ARGS ?= -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast setup lint style types prose collection docs clean

quickstart: setup
	.venv/bin/python examples/quickstart/prepare.py
	.venv/bin/lrpath run $(PLAN)
	.venv/bin/lrpath report $(PLAN)

test: setup
	@$(MAKE) --no-print-directory --jobs=2 style types prose collection
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-fast: setup
	.venv/bin/python -m pytest -n 2 --fast

lint:
	@$(MAKE) --no-print-directory --jobs=2 style types prose

style: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/mypy

prose: setup
	.venv/bin/python scripts/prose.py

# pytest rewrites the modules of the tests at their import: once here instead of in every worker, which also reports
# the errors.
collection: setup
	@PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest --collect-only >/dev/null 2>&1 || true

docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

setup:
	@scripts/setup.sh

clean:
	rm -rf .venv megatron_lrpath/site .pytest_cache .mypy_cache .ruff_cache *.egg-info
