# make demo   the main job: sixteen garments, sequentially and in parallel, in one picture
# make test   ruff, mypy and every test
# make lint   ruff and mypy alone
# make oldest every test with the oldest releases that pyproject.toml allows; downloads gigabytes
# make bench  every benchmark; prints its figures
# make docs   the pages and a reference of all public names, as docs/_build/index.html
# make clean  remove the environment and everything generated
#
# Needs only make and Python 3.10+. Another interpreter:  make demo PYTHON=python3.12
# More options for pip, such as an index with CPU-only builds of torch:  make demo PIP_FLAGS="..."

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) $(PIP_FLAGS)

# Stamps: touched when a step is complete, so a second run installs nothing.
CREATED := $(VENV)/.created
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready
BENCH_READY := $(VENV)/.bench-ready
DOCS_READY := $(VENV)/.docs-ready

.DEFAULT_GOAL := help
.PHONY: demo test tests lint oldest bench docs clean help

demo: $(DEMO_READY)
	$(BIN)/piadm sample --out demo.png
	@echo "The picture is $(CURDIR)/demo.png"

test: lint tests

# A process for every core, up to eight, and one thread each: most tests call small networks, which threads slow down.
tests: $(TEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

oldest:
	$(MAKE) tests VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

bench: $(BENCH_READY)
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: $(DOCS_READY)
	$(BIN)/python -m sphinx --builder html --fail-on-warning docs docs/_build

clean:
	rm -rf $(VENV) .venv-oldest build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache demo.png piadm-sample.png
	find src tests benchmarks examples training -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "piadm needs Python 3.10 or newer as '$(PYTHON)'; name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "'$(PYTHON)' cannot create environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO_READY): pyproject.toml $(CONSTRAINTS) | $(CREATED)
	$(PIP) --editable '.[cli,plots,diffusers]'
	@touch $@

$(TEST_READY): pyproject.toml $(CONSTRAINTS) | $(CREATED)
	$(PIP) --editable '.[test]'
	@touch $@ $(DEMO_READY)

$(BENCH_READY): pyproject.toml $(CONSTRAINTS) | $(CREATED)
	$(PIP) --editable '.[bench]'
	@touch $@ $(TEST_READY) $(DEMO_READY)

$(DOCS_READY): pyproject.toml $(CONSTRAINTS) | $(CREATED)
	$(PIP) --editable '.[docs]'
	@touch $@
