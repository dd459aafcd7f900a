# The trainer in .venv and SGLang in .venv-rollout, on CUDA 13:
#   docker build --tag klear-megatron .
#   docker run --gpus all --shm-size 16g --ulimit memlock=-1 -it klear-megatron
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bubblewrap g++ git make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /klear_megatron
# First what takes long and seldom changes.
COPY Makefile setup.py pyproject.toml README.md ./
COPY requirements requirements
COPY tools tools
COPY klear_megatron klear_megatron
# There is no nvidia-smi while an image is built.
RUN make setup PLATFORM=gpu PYTHON=python3.12
COPY . .
ENV PATH=/klear_megatron/.venv/bin:$PATH
