# The commands that people type; `make` alone lists them. PYTHON=... names another interpreter.
PYTHON ?= python
FILE ?= tests
# Of the tests: what runs in a checkout where csrc/ has not been built.
QUICK = tests/house/test_house.py tests/house/test_guides.py tests/model tests/data \
	tests/settings/test_community_names.py tests/evaluation/test_windows.py \
	tests/training/test_schedule.py tests/training/test_optim.py

.DEFAULT_GOAL := help
.PHONY: help install test quick check format types demo bench kernels gpu

help:  ## this list
	@grep -E '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "make %-9s %s\n", $$1, $$2}'

install:  ## build csrc/ and install everything that tests and tools need
	$(PYTHON) -m pip install -e '.[test,dev]' -c constraints.txt

test:  ## all tests on all cores; FILE=tests/ops/test_gptq.py: those of one file
	$(PYTHON) -m pytest -q -n auto $(FILE)

quick:  ## the tests that need no compiler
	$(PYTHON) -m pytest -q $(QUICK)

check:  ## linter and formatting, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format:  ## format, and mend what the linter can mend
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types:  ## the type checker
	$(PYTHON) -m mypy

demo:  ## train, quantize, write and score the demo: about three minutes on two cores
	$(PYTHON) train_gpt.py PRESET=demo

bench:  ## time every operation beside its baseline
	$(PYTHON) -m pytest bench/

kernels:  ## compile every kernel for Hopper, with no GPU: registers, spills, least time
	$(PYTHON) -m bench.kernels.static_report

gpu:  ## on a machine with a GPU: nine minutes of tests and figures; OUT=folder for the facts
	bench/gpu.sh $(OUT)
