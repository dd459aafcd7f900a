"""Writing Hugging Face checkpoints in a stream: a shard's header is known before its data is."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from klear_megatron.conversion.dtypes import SAFETENSORS_NAMES, dtype_name

Spec = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor to come."""


def write_header(file: BinaryIO, specs: Sequence[Spec]) -> None:
    """The beginning of a safetensors file; `write_tensor` adds the tensors, in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in specs:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """The tensor's numbers, in row-major order."""
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def shard_names(count: int) -> list[str]:
    """The file names transformers gives to `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes the index of a sharded checkpoint: tensor name -> file."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def set_config_dtype(folder: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Lets config.json name the weights' dtype, since loaders trust it; the largest if mixed."""
    dtype = max(set(dtypes), key=lambda d: d.itemsize)
    config = json.loads((folder / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype_name(dtype):
        config[key] = dtype_name(dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
