# The trainer in .venv and SGLang in .venv-rollout, on CUDA 13:
#   docker build --tag klear-megatron .
#   docker run --gpus all --shm-size 16g --ulimit memlock=-1 -it klear-megatron
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# Without ibverbs-providers NCCL finds no InfiniBand, and hosts talk over TCP.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        bubblewrap g++ git ibverbs-providers make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /klear_megatron
# First what takes long and seldom changes: no more of the package than its name is needed for it.
COPY Makefile setup.py pyproject.toml ./
COPY requirements requirements
COPY tools/install_packages.sh tools/install_transformer_engine.sh tools/
COPY klear_megatron/__init__.py klear_megatron/
# There is no nvidia-smi while an image is built.
RUN PIP_NO_CACHE_DIR=1 make setup PLATFORM=gpu PYTHON=python3.12
COPY . .
ENV PATH=/klear_megatron/.venv/bin:$PATH
