# Needs only python3 >= 3.11 (with venv) and make. Every target may be run again at any time.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The default run of `make train`; `make train ARGS="--steps 1000 --name longer"` adds to it.
TRAIN := jaxrec.models.huginn:TINY --data python-docs --steps 220 --optimizer.learning-rate 4e-3

# Most of the suite's time is compilation, which uses one core; tests/conftest.py deals the tests out.
PARALLEL := -n auto --maxprocesses 4

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: help venv train test lint bench notebooks peers

help:
	@echo "make train      train the default looped language model; more options in ARGS=..."
	@echo "make test       the test suite; a part of it with ARGS=tests/ops"
	@echo "make lint       ruff and mypy"
	@echo "make bench      timings of the scans and of a training step"
	@echo "make notebooks  execute notebooks/*.py into build/notebooks"
	@echo "make venv       .venv with everything the above need (they make it themselves)"
	@echo "make peers      add to .venv what the benchmarks compare against (torch and more)"

venv: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("jaxrec needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Installing into .venv; this takes a minute or two."
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

train: venv
	$(BIN)/jaxrec train $(TRAIN) $(ARGS)

test: venv
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/jaxrec bench scan $(ARGS)
	$(BIN)/jaxrec bench train $(ARGS)

notebooks: venv
	$(BIN)/python notebooks/run.py $(ARGS)

# recurrentgemma 1.0.1 asks for typeguard<3 and numpy<2.4, which tyro and this environment rule out, so
# it goes in without its dependencies (those it does need are in the extra).
peers: venv
	@$(PIP) install -c constraints.txt -e '.[peers]'
	@$(PIP) install --no-deps recurrentgemma==1.0.1
