# kvmgmem: `make selftest` is the main job, `make test` is everything. Both do all the set-up themselves.

SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
NATIVE := $(wildcard native/*.c native/*.h) native/build_native.py setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help setup guest-tools guest-kernel selftest test lint check bench-harness clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(VENV)/.installed ## install what is missing: Debian packages (root or sudo), a virtual environment, the binding

$(VENV)/.installed: $(NATIVE) scripts/setup
	scripts/setup $(VENV)
	@touch $@

selftest: setup ## run the selftests on this machine's KVM, or in a QEMU guest if it has none
	@if $(VENV)/bin/kvmgmem selftest --which | grep -q '^guest'; then scripts/setup-guest; fi
	@$(VENV)/bin/kvmgmem selftest

test: setup guest-tools lint guest-kernel check ## lint, the harness's own tests, the selftests here (if there is KVM) and in a QEMU guest
	@$(VENV)/bin/kvmgmem selftest --both

guest-tools:
	@scripts/setup-guest

# Before `check`, whose tests of the supervisor are skipped where there is no kernel that real guests could boot.
guest-kernel: setup guest-tools
	@$(VENV)/bin/kvmgmem kernel build >/dev/null || echo "kvmgmem: the supervisor's tests with real guests are skipped" >&2

lint: setup ## ruff, mypy, and a build of the C with all warnings as errors
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	scripts/lint-native

check: setup ## the harness's own tests, and whether a test asserts each row of the contract
	@$(VENV)/bin/kvmgmem kernel headers >/dev/null || echo "kvmgmem: the uAPI header is not compared with the kernel's" >&2
	@$(VENV)/bin/kvmgmem contract --check
	$(PY) -m pytest tests -q

bench-harness: setup ## how fast the harness is; ratios from one run, never a verdict
	$(PY) scripts/bench_harness.py

clean: ## remove what was built here (the kernels' cache: kvmgmem kernel rm --all --sources)
	rm -rf $(VENV) build *.egg-info kvmgmem/*.so kvmgmem/_native.c .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
