# Every command makes its own environment first, so each works in a fresh clone.
#   make test        all tests but the slow ones          ARGS="-k name" passes on to pytest
#   make check       what CI runs: tests, style, types, the wheel
#   make quickstart  train and sample a real small model  ARGS="..." passes on to it
#   make benchmark   QST beside torchtune's methods        ARGS=--quick, ARGS=losses, ARGS=--help
#   make study       what each method learns              ARGS="--data DIRECTORY --quick", ARGS=--help
PYTHON ?= python3
VENV ?= .venv
# The exact versions that CI runs. `make CONSTRAINTS=/dev/null test` takes the newest that fit.
CONSTRAINTS ?= constraints.txt
# CI sets .ci/requirements.txt: these versions with the hashes of their files, for Python 3.11 on Linux without CUDA.
LOCK ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := qst_tune recipes configs benchmarks

.PHONY: test check lint format wheel quickstart benchmark study lock licences clean

# One worker a core; each imports torch and transformers once.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

check: test lint wheel

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet --config pyproject.toml $(PACKAGES)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# setuptools copies into build/ and never deletes there: without the rm, a module that was removed
# would still be in the next wheel.
wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

quickstart: $(STAMP)
	$(BIN)/python -m qst_tune.quickstart $(ARGS)

# About 40 minutes on two quiet cores; a run that was cut short goes on where it stopped.
benchmark: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

# Half a day for all tasks and methods, half an hour with --quick; goes on where it stopped.
study: $(STAMP)
	$(BIN)/python -m benchmarks.study $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# From constraints.txt, after a version there has changed.
lock:
	$(PYTHON) .ci/lock.py > .ci/requirements.tmp
	mv .ci/requirements.tmp .ci/requirements.txt

licences: $(STAMP)
	$(BIN)/python docs/make_licences.py

# setuptools comes first, so that ours is built with the pinned one instead of a newest one in a
# build environment of its own, which -c does not reach.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) setuptools
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev,quickstart]'
else
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
endif
	touch $@
