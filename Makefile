# Thin: each target is a line that a person could type.
PYTHON = .venv/bin/python

NODES = 3

.PHONY: run test test-all lint bench rehearse setup setup-test setup-rehearse

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

# Needs root, for the nodes are namespaces.
rehearse: setup-rehearse
	$(PYTHON) -m deploy rehearse --nodes $(NODES)

setup:
	./bootstrap

setup-rehearse:
	./bootstrap rehearse

setup-test:
	./bootstrap test
