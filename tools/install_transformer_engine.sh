#!/usr/bin/env bash
# Installs transformer-engine-torch into a virtual environment, built against the torch in it:
#   tools/install_transformer_engine.sh .venv [WHEELS]
# It exists as source only. pip by itself would build it against the newest torch, in an environment
# that it throws away, and the result would not load. The wheel is kept in WHEELS and built again only
# for another release of torch, Python or Transformer Engine. Needs a CUDA toolkit (CUDA_HOME) and a
# C++ compiler; MAX_JOBS limits the compiler processes, which take 1.5 GB each.
set -euo pipefail
venv=$(realpath "$1")
kept=${2:-$HOME/.cache/klear_megatron/wheels}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
read -r release torch cuda python packages < <("$venv/bin/python" - <<'EOF'
import importlib.metadata
import sys
import sysconfig

import torch

release = importlib.metadata.version("transformer-engine")
packages = sysconfig.get_path("purelib")
print(release, torch.__version__, torch.version.cuda, sys.implementation.cache_tag, packages)
EOF
)
if [ "$cuda" = None ]; then
    echo "torch $torch in $venv is a build without CUDA: Transformer Engine needs one with" >&2
    exit 1
fi
major=${cuda%%.*}
toolkit=$("$CUDA_HOME/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\).*/\1/p' || true)
if [ "$toolkit" != "$major" ]; then
    echo "torch $torch needs a toolkit of CUDA $major, but in $CUDA_HOME there is" \
        "${toolkit:+CUDA }${toolkit:-none}: install one, or set CUDA_HOME" >&2
    exit 1
fi
folder=$kept/transformer-engine-$release-torch-$torch-$python
if ! compgen -G "$folder/*.whl" >/dev/null; then
    echo "==> building transformer-engine-torch $release against torch $torch (minutes; once per host)"
    rm -rf "$folder.partial"
    # Headers and libraries of the CUDA packages that torch came with. FORCE_BUILD: otherwise it would
    # first look for a ready wheel elsewhere.
    nvidia=$packages/nvidia
    CUDNN_PATH=$nvidia/cudnn \
        CPLUS_INCLUDE_PATH=$nvidia/cu$major/include:$nvidia/cudnn/include:$nvidia/nccl/include \
        LIBRARY_PATH=$nvidia/cu$major/lib:$nvidia/cudnn/lib:$nvidia/nccl/lib \
        NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE PATH=$venv/bin:$PATH \
        "$venv/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder.partial" \
        "transformer-engine-torch==$release"
    mv "$folder.partial" "$folder"
fi
"$venv/bin/pip" install --quiet --no-deps "$folder"/*.whl
"$venv/bin/python" -c 'import torch, transformer_engine.pytorch'  # torch brings its NCCL
