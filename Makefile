# `make paper` and `make test` from a fresh clone. Packages go into .venv, results into runs/.

SHELL := bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do "$$p" -c \
	'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
RUN := $(VENV)/bin/python
comma := ,

.DEFAULT_GOAL := help
.PHONY: help paper refresh scale test test-all fuzz bench gpu book lab clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

paper: $(VENV)/core.stamp ## run all notebooks in the quick profile, draw the figures, render them to HTML
	@$(RUN) -m lib paper

refresh: $(VENV)/scale.stamp ## compute README's numbers, figures and notebooks' outputs from paper_data (no training)
	@$(RUN) -m lib refresh

scale: $(VENV)/scale.stamp ## like paper, for Section 6 and TriviaQA: fetch a chat model and fine-tune it
	@$(RUN) -m lib fetch
	@$(RUN) -m lib scale

test: $(VENV)/extras.stamp ## run the fast tests
	@$(RUN) -m lib test

test-all: $(VENV)/extras.stamp ## run the slow tests too: notebooks, browser, Slurm, killed processes
	@$(RUN) -m lib test -m ""

fuzz: $(VENV)/extras.stamp ## give damaged input to everything that reads files, replies and requests (an hour)
	@$(RUN) -m lib test tests/test_doors.py --hypothesis-profile fuzz --timeout 7200

bench: $(VENV)/extras.stamp ## measure speed against Hugging Face (10 minutes; leave the machine alone meanwhile)
	@$(RUN) -m lib notebooks A2

# Installs nothing: GPU machines are often offline. RUN=python uses the current environment; ITL_RUNS says where rows go.
MINUTES ?= 14
ON_GPU ?= --device cuda --jobs 8
gpu: ## the headline's largest missing runs on a GPU that is free for MINUTES (14), eight at a time; the same command resumes
	@if nvidia-cuda-mps-control -d 2>/dev/null; then trap 'echo quit | nvidia-cuda-mps-control' EXIT; \
	else echo "NVIDIA's MPS did not start: unless it runs already, processes take turns"; fi; \
	end=$$(($$(date +%s) + 60 * ($(MINUTES) - 1))); \
	hours() { awk "BEGIN {left = $$end - $$(date +%s); print (left > 0 ? left : 0) / 3600}"; }; \
	$(RUN) -m lib sweep 05_2 --profile laptop --facts 8192 --facts 32768 $(ON_GPU) --max-hours $$(hours); first=$$?; \
	$(RUN) -m lib sweep 05_1 --profile laptop --facts 16384 --facts 8192 $(ON_GPU) --max-hours $$(hours) && exit $$first

book: $(VENV)/book.stamp ## build a site from the notebooks, with lesson plan and solutions
	@$(RUN) -m lib book

lab: $(VENV)/core.stamp ## open the notebooks in JupyterLab
	@JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter" $(RUN) -m jupyter lab --ServerApp.root_dir=notebooks

clean: ## delete .venv and the caches; what was measured (runs/) stays
	rm -rf $(VENV) *.egg-info .pytest_cache .hypothesis .ruff_cache
	find lib tests -name __pycache__ -prune -exec rm -rf {} +

# $(call install,what,arguments): pip is quiet, so a dot every few seconds shows that it is alive. Modules are
# compiled at their first import instead: a minute less on two cores, if Python may write its bytecode.
unexport PYTHONDONTWRITEBYTECODE
define install
@echo "Installing $(1) into $(VENV)"
@while sleep 3 >/dev/null; do printf .; done & trap "kill $$!; echo" EXIT; $(RUN) -m pip install -qq --no-compile $(2)
endef

$(RUN):
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: name it with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.stamp: pyproject.toml constraints.txt | $(RUN)
	$(call install,the core$(comma) with JupyterLab (a few minutes$(comma) 1.2 GB),-c constraints.txt -e .)
	@touch $@

$(VENV)/scale.stamp: $(VENV)/core.stamp
	$(call install,what Section 6 takes,-c constraints.txt -e ".[scale]")
	@touch $@

$(VENV)/book.stamp: $(VENV)/core.stamp
	$(call install,what the book takes,-c constraints.txt -e ".[book]")
	@touch $@

$(VENV)/extras.stamp: $(VENV)/core.stamp
	$(call install,the extras,-c constraints.txt -e ".[scale$(comma)serve$(comma)monitor$(comma)book$(comma)dev]")
	@touch $@
