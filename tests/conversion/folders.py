"""Reads checkpoint folders with safetensors' own reader."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face checkpoint."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    assert weights, folder
    return weights


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two checkpoints have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )
