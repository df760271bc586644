# Two commands do everything: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test test-all lint install clean

demo: $(STAMP)  ## answer questions about stories with the bundled model, and show every forward pass
	@$(BIN)/python examples/demo.py

test: $(STAMP) lint  ## style, types, and every test but the slow ones
	@echo "== tests"
	@$(BIN)/python -m pytest

test-all: $(STAMP) lint  ## the slow tests too
	@$(BIN)/python -m pytest -m ""

lint: $(STAMP)
	@echo "== style and types"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== installing splitfuse and its test extras into .venv (a minute; PyTorch is the largest part)"
	@$(PYTHON) -c 'import sys; sys.exit("splitfuse needs Python 3.11 or newer, this is " + sys.version.split()[0] \
	  + "; name another with: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
