# Everything a contributor runs, each by one word. Needs python3 (3.11 or newer, with pip and venv), make and git;
# the rest is installed into .venv, at the versions that uv.lock names.

PYTHON     ?= python3
UV_VERSION := 0.13.9
BIN        := .venv/bin

# The folders that both type checkers read. One that does not exist yet is left out.
TYPED := $(wildcard src bench examples tests/typing)

# uv works in our environment, whatever else is activated, and with the Python that made it.
export UV_PROJECT_ENVIRONMENT := .venv
export UV_PYTHON_DOWNLOADS    := never
unexport VIRTUAL_ENV

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test check crash examples chaos bench docs format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed-dev  ## Install everything for development (does nothing the second time)
	@:

serve: .venv/.installed  ## Serve the demo sagas on http://127.0.0.1:8092 and jobs on :8091; stop with Ctrl-C
serve: export NETSCRIPT_SAGA_STORE = kv
serve:
	@exec $(BIN)/python -m examples.serve

# Several files at a time; one after the other, as a debugger wants it: ARGS="-n0 --pdb".
test: install  ## Run the tests, with seconds per group (some of them: make test ARGS="tests/core -k retry")
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

check: install  ## Check format, lint, types (mypy and pyright) and floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/pyright $(TYPED)
	$(BIN)/lint-imports --no-logo

# make hands what is set on its command line to the run as environment variables: KILLS, MESSAGES, PROCESSES, SEED.
crash: install  ## Kill workers and count what was lost (shorter: KILLS=12 MESSAGES=1200; two on one store: PROCESSES=2)
	$(BIN)/python -m tests.crash

examples: install  ## Stop every example at every commit and kill it (some of them: make examples ARGS="-k orders")
	SAGALOOM_EXAMPLES=all $(BIN)/python -m pytest tests/examples/test_stories.py $(ARGS)

# And of this one: STORE (postgres or kv), ORDERS, KILLS, STOPS, RESTARTS, PROCESSES, SEED.
# Of queues: QUEUE (redis, rabbitmq, postgres or kv), MESSAGES, KILLS, CONSUMERS, SEED.
chaos: install  ## Kill workers, stop them, restart the database, and ask an oracle (STORE=kv; queues: QUEUE=redis)
	$(BIN)/python -m $(if $(QUEUE),tests.queues.chaos,tests.chaos)

bench: .venv/.installed-peers  ## Measure throughput and latency on this machine, and the queues of others
	$(BIN)/python -m bench

docs: install  ## Build the documentation into build/docs/index.html; a warning is an error
	$(BIN)/python docs/generate.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs

format: install  ## Rewrite the code in the project's format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment, the caches and what the demo wrote
	rm -rf .venv .sagaloom .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, so that `make serve` on a new machine fetches what it runs and not the tools we build with.
# --inexact: a serve between two installs takes nothing away.
.venv/.installed: pyproject.toml uv.lock | $(BIN)/uv
	$(BIN)/uv sync --frozen --no-dev --inexact
	@touch $@

.venv/.installed-dev: pyproject.toml uv.lock | $(BIN)/uv
	$(BIN)/uv sync --frozen --all-extras --all-groups --no-group peers --inexact
	@touch .venv/.installed $@

.venv/.installed-peers: .venv/.installed-dev
	$(BIN)/uv sync --frozen --all-extras --all-groups
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/arq
	$(BIN)/uv pip install --quiet --python .venv/arq/bin/python 'arq==0.28.0' 'redis==5.3.1'
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/restate-sdk
	$(BIN)/uv pip install --quiet --python .venv/restate-sdk/bin/python 'restate-sdk==1.3.0' 'hypercorn==0.18.0'
	@npm install --silent --no-audit --no-fund --ignore-scripts --prefix .venv/restate \
	    "@restatedev/restate-server-$$(node -p 'process.platform + "-" + process.arch')@1.7.12" \
	    || echo "the server of Restate cannot be installed by npm: line 5 leaves it out" >&2
	@touch .venv/.installed .venv/.installed-dev $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sagaloom needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
