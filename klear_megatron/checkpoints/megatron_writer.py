"""Streams Megatron's distributed checkpoints to disk, without Megatron, ranks or a model."""

import json
import pickle
from collections.abc import Mapping, Sequence
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

from klear_megatron.checkpoints.checksums import write_checksums
from klear_megatron.checkpoints.megatron_reader import full_shape, stacked
from klear_megatron.models import Weight
from klear_megatron.models.mapping import GatedMLP, Sharded

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ALIGNMENT = 64
"""Records begin at multiples of this in a file, as data does in a record."""


@dataclass(frozen=True)
class WrittenChunk:
    """A part of a row's full tensor, and the place where it was written."""

    name: str
    offsets: Sequence[int]
    sizes: Sequence[int]
    position: int
    length: int


def write_row(
    file: BinaryIO, row: Weight, full: Tensor, tensor_parallel_size: int
) -> list[WrittenChunk]:
    """Appends the row's full Megatron tensor, in the pieces that tensor-parallel ranks load."""
    dim, count = _cut(row, tensor_parallel_size)
    chunks: list[WrittenChunk] = []
    start = 0
    _, index = stacked(row.name)
    for piece in full.chunk(count, dim):
        # torch.save would write the whole storage behind a view.
        alone = piece.clone(memory_format=torch.contiguous_format) if count > 1 else piece
        # The reader maps records, and torch requires numbers aligned to their size.
        file.write(bytes(-file.tell() % _ALIGNMENT))
        position = file.tell()
        torch.save(alone.contiguous()[(None,) * len(index)], file)
        offsets = [start if d == dim else 0 for d in range(full.dim())]
        chunks.append(
            WrittenChunk(row.name, offsets, list(piece.shape), position, file.tell() - position)
        )
        start += piece.shape[dim]
    return chunks


def _cut(row: Weight, tensor_parallel_size: int) -> tuple[int, int]:
    """The dimension along which the ranks' pieces are cut, and the number of pieces."""
    if isinstance(row.mapping, GatedMLP):  # each rank has one piece of gate and one of up
        return 0, 2 * tensor_parallel_size if tensor_parallel_size > 1 else 1
    if isinstance(row.mapping, Sharded):
        return row.mapping.dim, tensor_parallel_size
    return 0, 1


def write_metadata(
    folder: Path,
    dtypes: Mapping[str, torch.dtype],
    table: Sequence[Weight],
    chunks: Mapping[str, Sequence[WrittenChunk]],
) -> None:
    """Writes the metadata that turns the complete files in `folder` into a checkpoint.

    Args:
        dtypes: row name -> dtype.
        chunks: file name -> the chunks in it.
    """
    last: dict[str, tuple[int, ...]] = {}  # key -> its last layer and expert
    for row in table:
        key, index = stacked(row.name)
        last[key] = max(last.get(key, ()), index)
    tensors: dict[str, Any] = {}
    for row in table:
        key, _ = stacked(row.name)
        size = torch.Size([*(number + 1 for number in last[key]), *full_shape(row)])
        properties = TensorProperties(dtype=dtypes[row.name])
        tensors.setdefault(key, TensorStorageMetadata(properties, size, []))
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, file_chunks in chunks.items():
        for chunk in file_chunks:
            key, index = stacked(chunk.name)
            offsets = torch.Size([*index, *chunk.offsets])
            sizes = torch.Size([*(1 for _ in index), *chunk.sizes])
            tensors[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(key, offsets)] = _StorageInfo(file, chunk.position, chunk.length)
    torch.save({}, folder / "common.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=storage)))
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    write_checksums(folder, {})
