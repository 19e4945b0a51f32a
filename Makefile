# Each target is one command that you can also type.
PYTHON = .venv/bin/python

NODES = 3

# The tests of deploy share one process, which waits most of the time. The other two processes use two cores.
PYTEST = $(PYTHON) -m pytest -n 3

.PHONY: run test test-slow test-all lint bench rehearse setup setup-test setup-rehearse

run: setup
	$(PYTHON) -m builder run causal_conv1d

test: setup-test lint
	$(PYTEST) -m "not slow"

# This takes an hour or more. The compilation of four units of flash-attn takes most of the time of one of the two processes.
test-slow: setup-test
	$(PYTHON) -m pytest -n 2 -m slow

test-all: test test-slow

lint: setup-test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/zizmor --offline --no-progress .github/workflows
	.venv/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

bench: setup-test
	$(PYTHON) -m bench

# This requires root, since the nodes are namespaces.
rehearse: setup-rehearse
	$(PYTHON) -m deploy rehearse --nodes $(NODES)

setup:
	./bootstrap

setup-rehearse:
	./bootstrap rehearse

setup-test:
	./bootstrap test
