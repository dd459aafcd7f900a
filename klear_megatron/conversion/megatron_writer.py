"""Writing Megatron's distributed checkpoints in a stream, without Megatron, ranks or a model."""

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from klear_megatron.conversion.megatron_reader import full_shape, stacked
from klear_megatron.models import Weight


@dataclass(frozen=True)
class Placed:
    """Where a row's tensor went."""

    name: str
    position: int
    length: int


def write_row(file: BinaryIO, row: Weight, full: Tensor) -> Placed:
    """Appends the row's full Megatron tensor as one chunk."""
    _, index = stacked(row.name)
    start = file.tell()
    torch.save(full.contiguous()[(None,) * len(index)], file)
    return Placed(row.name, start, file.tell() - start)


def write_metadata(
    folder: Path,
    table: Iterable[Weight],
    placed: Mapping[str, tuple[str, Placed]],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Writes what makes the files in `folder` a checkpoint, once all of them are complete.

    Args:
        placed: row name -> file in the folder, and where in it.
    """
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    table = list(table)
    counts: dict[str, int] = {}
    for row in table:
        key, _ = stacked(row.name)
        counts[key] = counts.get(key, 0) + 1
    for row in table:
        key, index = stacked(row.name)
        shape = full_shape(row)
        entry = tensors.setdefault(
            key,
            TensorStorageMetadata(
                TensorProperties(dtype=dtypes[row.name]),
                torch.Size([*([counts[key]] if index else []), *shape]),
                [],
            ),
        )
        offsets = torch.Size([*index, *(0 for _ in shape)])
        entry.chunks.append(
            ChunkStorageMetadata(offsets, torch.Size([*(1 for _ in index), *shape]))
        )
        file, place = placed[row.name]
        storage[MetadataIndex(key, offsets)] = _StorageInfo(file, place.position, place.length)
    torch.save({}, folder / "common.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=storage)))
    format_ = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(format_))
