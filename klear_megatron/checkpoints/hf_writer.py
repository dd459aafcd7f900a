"""Streams Hugging Face checkpoints to disk; a shard's header is known before its data."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from klear_megatron.checkpoints.dtypes import SAFETENSORS_NAMES, dtype_name
from klear_megatron.checkpoints.plan import Spec


def write_shard(file: BinaryIO, specs: Sequence[Spec], tensors: Iterable[Tensor]) -> str:
    """Writes a safetensors file, taking its tensors one after another.

    Returns:
        The file's SHA-256, in hexadecimal.
    """
    header = _header(specs)
    digest = hashlib.sha256()
    file.write(header)
    with ThreadPoolExecutor(1, "sha256") as thread:
        hashing = thread.submit(digest.update, header)
        for (name, dtype, shape), tensor in zip(specs, tensors, strict=True):
            assert tensor.dtype == dtype, name
            assert tensor.shape == shape, name
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            before, hashing = hashing, thread.submit(digest.update, data)
            file.write(data)
            before.result()
        hashing.result()
    return digest.hexdigest()


def _header(specs: Sequence[Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in specs:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def shard_names(count: int) -> list[str]:
    """The file names that transformers gives to `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes the index of a sharded checkpoint: tensor name -> file."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def set_config_dtype(folder: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Sets config.json's dtype, which loaders trust, to the weights' dtype (widest if mixed)."""
    dtype = dtype_name(max(set(dtypes), key=lambda dtype: dtype.itemsize))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        path.write_text(json.dumps({**config, key: dtype}, indent=2) + "\n")
