# reclip_d2: `make` lists the targets. Settings: VENV, PYTHON, SEED, OUT (`make demo SEED=1 OUT=/tmp/demo`).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lint docs kernel-report clean FORCE

VENV ?= .venv
# The interpreter for the environment; if empty, the first suitable one of CANDIDATES.
PYTHON ?=
SEED ?= 0
OUT ?= output/demo

PY := $(VENV)/bin/python
CANDIDATES := python3.11 python3.12 python3 python3.13 python3.10
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@echo "make TARGET, with one of"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "The environment is $(VENV) (VENV=path for another). It is made on first use and kept up to date."

demo: env ## train and evaluate on the embedded data set; table, report.json and report.png in OUT
	$(PY) tools/demo.py --seed $(SEED) --output-dir $(OUT)

test: lint ## lint, then all tests except the slow ones (CUDA tests only with a GPU)
	$(PY) -m pytest

test-slow: env ## only the slow tests
	$(PY) -m pytest -m slow

lint: env ## ruff (rules and format) and import-linter (the order of the folders)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

docs: env ## the documentation as a site, in site/; broken links and anchors are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

kernel-report: env ## nvcc's report of registers and spills per kernel, from the last build
	$(PY) tools/kernel_report.py $(STATE)/build.log

clean: ## remove builds and caches; output/ and the environment stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find reclip_d2 tests tools datasets demo -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find reclip_d2 -name '*.so' -delete
	rm -f $(STATE)/installed

# ---- the environment --------------------------------------------------------------------------------------------
# Three steps, each with a stamp that is written last: interrupted steps are repeated, finished ones are not.
# An existing environment (no `owned` stamp) keeps its versions; only missing packages are installed.
STATE := $(VENV)/.reclip_d2

env: $(STATE)/installed ## make or update the environment

# 1. The interpreter. Repeated if it is missing (a removed system Python leaves a dangling link).
$(STATE)/venv: $(if $(shell $(PY) -c 'print(1)' 2>/dev/null),,FORCE)
	@if [ ! -e $(STATE)/owned ] && $(PY) -c '' 2>/dev/null; then \
	  $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "error: $(PY) is older than Python 3.10: choose another VENV" >&2; exit 1; }; \
	  $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 \
	    || { echo "error: $(VENV) has no pip: add it, or choose another VENV" >&2; exit 1; }; \
	  echo "environment: using $(VENV) as it is; what it lacks will be added"; \
	else \
	  if [ ! -e $(STATE)/owned ] && [ -n "$$(ls -A $(VENV) 2>/dev/null)" ]; then \
	    echo "error: $(VENV) exists and is no Python environment: choose another VENV or remove it" >&2; exit 1; \
	  fi; \
	  found=; \
	  for python in $(or $(PYTHON),$(CANDIDATES)); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.10 or later with its venv module found (tried: $(or $(PYTHON),$(CANDIDATES)));" \
	      "install python3.11 and python3.11-venv, or name one with PYTHON=" >&2; exit 1; \
	  fi; \
	  echo "environment: making $(VENV) with $$($$found --version)"; \
	  mkdir -p $(STATE); touch $(STATE)/owned; \
	  $$found -m venv $(VENV); \
	fi; \
	mkdir -p $(STATE); touch $@

# 2. The packages and Detectron2. Packages that an interrupted pip left half-installed have no INSTALLER file, but pip
#    would consider them installed: they are removed first. Linux x86-64: 6.7 GB measured when
#    installed; the 2 GB and 3 GB of wheels are estimates.
free = $$(df -Pk "$(1)" | awk 'NR == 2 { printf "%.1f GB free", $$4 * 1024 / 1e9 }')
$(STATE)/packages: $(STATE)/venv requirements.txt $(wildcard reclip_d2/install_detectron2/*.py)
	@if [ -e $(STATE)/owned ]; then \
	  find $(VENV)/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' \; \
	    -exec echo 'environment: installing again, it was interrupted:' '{}' \; -exec rm -rf '{}' + ; \
	fi; \
	if [ -e $(STATE)/owned ] && $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "environment: installing the pinned packages. The first time PyTorch and its CUDA libraries are downloaded,"; \
	  echo "environment: about 3 GB: some minutes to half an hour, as fast as your line is. It takes 7 GB of disk. Interrupt it"; \
	  echo "environment: and repeat it at will."; \
	  bash tools/install_pinned.sh $(PY); \
	else \
	  echo "environment: installing what is missing; PyTorch, if it is missing, is about 3 GB with its CUDA libraries"; \
	  $(PY) -m pip install 'setuptools>=77' wheel 'torch>=2.6' torchvision; \
	fi || { \
	  echo "error: the packages were not installed; pip names the package and the reason above. If the disk is full:" \
	    "$(VENV) needs about 7 GB ($(call free,$(VENV))); pip's temporary files need 2 GB in $${TMPDIR:-/tmp}" \
	    "($(call free,$${TMPDIR:-/tmp}); TMPDIR sets the folder); pip's cache takes 3 GB (PIP_NO_CACHE_DIR=1: none)" >&2; \
	  exit 1; \
	}
	@echo "environment: installing Detectron2"
	@$(PY) -m reclip_d2.install_detectron2
	@touch $@

# 3. reclip_d2 itself, editable (by a path, so that a folder of its name next to the working folder does not hide it),
#    with its extension; repeated when its build changes, or when the environment was used for another checkout. Without a
#    C++ compiler the package is installed without its extension, which is slower; an extension that does not compile is
#    an error.
$(STATE)/installed: $(STATE)/packages setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*) \
    $(if $(filter $(CURDIR),$(shell cat $(STATE)/installed 2>/dev/null)),,FORCE)
	@set -- $${CXX:-c++}; \
	if [ "$${NO_EXTENSION:-0}" = 0 ] && ! command -v "$$1" >/dev/null; then \
	  export NO_EXTENSION=1; \
	  without="there is no C++ compiler ($$1). Install one and repeat: make clean env"; \
	elif [ "$${NO_EXTENSION:-0}" != 0 ]; then \
	  without="NO_EXTENSION is set. To build it: make clean env"; \
	fi; \
	if [ -z "$${without:-}" ]; then \
	  echo "environment: compiling and installing reclip_d2 in editable mode; this can take some minutes"; \
	fi; \
	if ! $(PY) -m pip install --verbose --no-build-isolation --config-settings editable_mode=compat --editable '.[dev]' >$(STATE)/build.log 2>&1; then \
	  grep -m 3 -E '(^|[ :])([Ff]atal )?([Ee]rror|ERROR):? ' $(STATE)/build.log >&2 || tail -n 3 $(STATE)/build.log >&2; \
	  echo "error: reclip_d2 was not built (log: $(STATE)/build.log);" \
	    "to do without its C++ extension, in plain PyTorch and slower: make env NO_EXTENSION=1" >&2; \
	  exit 1; \
	fi; \
	if [ -n "$${without:-}" ]; then \
	  echo "environment: NO EXTENSION was built, plain PyTorch takes its place, slower: $$without"; \
	fi
	@echo "$(CURDIR)" > $@
	@echo "environment: $(VENV) is ready"

FORCE:
