# Thin: each target is a line that a person could type.
PYTHON = .venv/bin/python

.PHONY: run test test-all lint bench setup setup-test

run: setup
	$(PYTHON) -m builder run causal_conv1d

test: setup-test lint
	$(PYTHON) -m pytest -m "not slow"

test-all: setup-test lint
	$(PYTHON) -m pytest

lint: setup-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: setup-test
	$(PYTHON) -m bench

setup:
	./bootstrap

setup-test:
	./bootstrap test
