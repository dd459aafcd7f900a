# Two commands do everything on a fresh machine with Python 3.11 (on GPUs: 3.12 where there is one):
#   make quickstart   sets up and runs the whole loop, from a base model to a trained checkpoint
#   make test         sets up and passes the tests
SHELL := /bin/bash
PLATFORM := $(shell command -v nvidia-smi >/dev/null && echo gpu || echo cpu)
# pyenv keeps it off the PATH.
PYTHON_OF_GPUS ?= $(shell for python in python3.12 ~/.pyenv/versions/3.12*/bin/python3.12; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
PYTHON ?= $(or $(if $(filter gpu,$(PLATFORM)),$(PYTHON_OF_GPUS)),python3.11)
CUDA_HOME ?= /usr/local/cuda
# Transformer Engine's compiled wheels are kept here, outside the clone.
WHEELS ?= $(HOME)/.cache/klear_megatron/wheels

.PHONY: setup setup-launch quickstart test test-gpu-structure lint clean

quickstart: setup
	bash examples/quickstart/run.sh

test: setup setup-launch lint
	@bash tools/install_packages.sh "slurmctld slurmd munged" slurmctld slurmd slurm-client munge
	@bash tools/install_packages.sh chromium chromium fonts-dejavu-core
	@echo "==> tests"
	.venv/bin/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

# What can be proven of the GPU path without a GPU. It downloads 3 GB, and compiles Transformer Engine
# once, for some minutes.
test-gpu-structure: .venv-gpu-structure/ready .venv-rollout/ready
	@echo "==> tests of the CPU path with the GPUs' Megatron-Core, without Transformer Engine"
	PYTHONPATH="$(CURDIR)/tests/gpu_structure/without_engine" \
		.venv-gpu-structure/bin/python -m pytest tests/models tests/policy \
		tests/distributed/test_checkpoints.py tests/distributed/test_killed_writers.py
	@echo "==> tests of structure"
	.venv-gpu-structure/bin/python -m pytest tests/gpu_structure

lint: setup
	@echo "==> ruff and mypy"
	.venv/bin/ruff format --check --quiet .
	.venv/bin/ruff check --quiet .
	.venv/bin/mypy

setup: .venv/ready .venv-rollout/ready
	@bash tools/install_packages.sh bwrap bubblewrap

# A stamp is written last, so an interrupted set-up is taken up again.
.venv/ready: requirements/$(PLATFORM).txt setup.py
	@echo "==> setting up .venv for $(PLATFORM): torch, Megatron-Core, Transformers (a minute or two)"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements/$(PLATFORM).txt
	[ $(PLATFORM) = cpu ] || bash tools/install_transformer_engine.sh .venv "$(WHEELS)"
	.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Transformer Engine's PyTorch half is compiled without optimisation here: no kernel is in it, and
# nothing is measured.
.venv-gpu-structure/ready: requirements/gpu.txt requirements/cpu.txt setup.py
	@[ -n "$(PYTHON_OF_GPUS)" ] || { echo "Python 3.12 is not here: install it, or set PYTHON_OF_GPUS"; exit 1; }
	@[ -x "$(CUDA_HOME)/bin/nvcc" ] || { echo "no CUDA 13 toolkit in $(CUDA_HOME): install one (nvcc and the" \
		"headers; no driver), or set CUDA_HOME"; exit 1; }
	@echo "==> setting up .venv-gpu-structure: torch for CUDA, Transformer Engine"
	$(PYTHON_OF_GPUS) -m venv .venv-gpu-structure
	.venv-gpu-structure/bin/pip install --quiet --requirement requirements/gpu.txt
	CXX="$(CURDIR)/tests/gpu_structure/unoptimized_c++" \
		bash tools/install_transformer_engine.sh .venv-gpu-structure "$(WHEELS)/unoptimized"
	.venv-gpu-structure/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv-rollout/ready: requirements/rollout-$(PLATFORM).txt
	@echo "==> setting up .venv-rollout for $(PLATFORM): SGLang (a minute or two)"
	$(PYTHON) -m venv .venv-rollout
	.venv-rollout/bin/pip install --quiet $$(grep '^torch==' $<)
	.venv-rollout/bin/pip install --quiet $(if $(filter cpu,$(PLATFORM)),--no-deps) --requirement $<
	touch $@

# nemo-run, for `klear-megatron launch`: only on the host that you submit from.
setup-launch: .venv-launch/ready

.venv-launch/ready: requirements/launch.txt
	@echo "==> setting up .venv-launch: nemo-run (a minute)"
	$(PYTHON) -m venv .venv-launch
	.venv-launch/bin/pip install --quiet --no-deps --requirement $<
	touch $@

clean:
	rm -rf .venv .venv-rollout .venv-launch .venv-gpu-structure runs
