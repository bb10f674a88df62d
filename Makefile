# make book   everything from a bare Python 3.11: environment, model, executed chapters, site
# make test   lint, types, unit tests, and a comparison of all stored outputs
#
# VENV         environment to use or create (default .venv; conda users: VENV="$CONDA_PREFIX")
# PYTHON       interpreter that creates it (3.11 or 3.12)
# TORCH_INDEX  index to take torch from; PyTorch's CPU index saves 2 GB on machines without a GPU
# Paths are relative on purpose: make cannot name a target whose path has a space in it.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
JOBS ?= 2
export TORCH_INDEX

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SCRIPTS := _build/extra/vendor/config.js
SITE := _build/html/.stamp
NBVAL := --nbval --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600

.PHONY: help setup vendor book execute lab test lint types unit outputs peers browser screenshots clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

$(READY): requirements.txt pyproject.toml tools/bootstrap.py
	@"$(PYTHON)" tools/bootstrap.py "$(VENV)"

$(SCRIPTS): tools/vendor.py $(READY)
	@"$(PY)" tools/vendor.py

setup: $(READY) ## the environment, with pinned versions
vendor: $(SCRIPTS) ## the site's scripts, so that it makes no outside request

# The chapters are executed into _build/notebooks; those whose sources did not change are kept.
# A failed build forgets its pages: Sphinx would not repeat their warnings.
book: $(SCRIPTS) ## execute the chapters and build the site
	@"$(PY)" -m ch15_helpers.bench.notebooks stage
	@if [ ! -e $(SITE) ] || [ -n "$$(find _build/notebooks _config.yml book/_ext $(SCRIPTS) -newer $(SITE) -type f)" ]; then \
		"$(VENV)/bin/jupyter-book" build _build/notebooks --config _config.yml --path-output . -n -W --keep-going --quiet \
			&& touch $(SITE) || { rm -rf _build/.doctrees $(SITE); exit 1; }; \
	fi
	@echo "The book is in $(CURDIR)/_build/html/index.html"

execute: $(READY) ## run the chapters anew and store their outputs in book/
	@"$(PY)" -m ch15_helpers.bench.notebooks execute

lab: $(READY) ## open the chapters in JupyterLab
	@"$(PY)" -m jupyterlab book

test: lint types unit outputs ## all checks

lint: $(READY)
	@"$(PY)" -m ruff check .

types: $(READY)
	@"$(PY)" -m mypy

unit: $(SCRIPTS) browser mpi
	@OMP_NUM_THREADS=1 "$(PY)" -m pytest -n $(JOBS) --dist loadfile tests

outputs: $(READY)
	@"$(PY)" -m pytest $(NBVAL) -o timeout=900 book

peers: $(READY) ## beside vLLM and FlashInfer on this GPU, where they are installed
	@"$(PY)" -m ch15_helpers.bench.production_peers

browser: $(READY)
	@"$(PY)" tests/browser.py --install

mpi: $(READY)
	@"$(PY)" tools/mpi.py --install

mpi-decode: mpi ## prefill and decode on NP=2 MPI processes over UCX; more by ARGS=..., HOSTS=a,b
	@"$(PY)" tools/mpi.py $(NP) $(if $(HOSTS),--hosts $(HOSTS)) -- $(ARGS)

torchrun-decode: $(READY) ## the same with torchrun, NP=2 on each of NNODES=1 nodes
	@"$(PY)" -m torch.distributed.run $(MEETING) --nproc_per_node $(NP) -m ch15_helpers.disagg.launch $(ARGS)

screenshots: browser ## pictures of the built site, desktop and phone, light and dark
	@"$(PY)" tests/screenshots.py

clean: ## remove what was built, keep the environment
	@rm -rf _build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
