"""Streams Megatron's distributed checkpoints to disk, without Megatron, ranks or a model."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from transformers import PretrainedConfig

from klear_megatron.checkpoints.checksums import write_checksums
from klear_megatron.checkpoints.megatron_companions import common_objects, write_run_config
from klear_megatron.checkpoints.megatron_folder import COMMON
from klear_megatron.checkpoints.megatron_reader import full_shape, stacked
from klear_megatron.models import Weight
from klear_megatron.models.mapping import GatedMLP, Sharded

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_EXTRA_STATES = "extra_states.pt"
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
    hf: PretrainedConfig,
) -> None:
    """Writes the metadata that turns the complete files in `folder` into a checkpoint.

    Args:
        hf: the model's config.
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
    # No FP8, as Transformer Engine says it; the same record serves all modules.
    torch.save([torch.empty(0, dtype=torch.uint8)], folder / _EXTRA_STATES)
    length = (folder / _EXTRA_STATES).stat().st_size
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, file_chunks in chunks.items():
        for chunk in file_chunks:
            key, index = stacked(chunk.name)
            offsets = torch.Size([*index, *chunk.offsets])
            sizes = torch.Size([*(1 for _ in index), *chunk.sizes])
            tensors[key].chunks.append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(key, offsets)] = _StorageInfo(file, chunk.position, chunk.length)
    for key in _extra_states(table, last):
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(_EXTRA_STATES, 0, length)
    rows, dtype = full_shape(table[0])[0], dtypes[table[0].name]
    torch.save(common_objects(hf, rows, dtype, iteration=0), folder / COMMON)
    write_run_config(folder, hf, dtype)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=storage)))
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))
    write_checksums(folder, {})


def _extra_states(table: Sequence[Weight], last: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Keys of the extra states that Megatron's modules, with or without Transformer Engine, expect.

    Args:
        last: key of a stacked tensor -> its last layer and expert.
    """
    ends = {len(end): end for end in last.values()} | {0: (0,)}
    modules = dict.fromkeys(row.name.rpartition(".")[0] for row in table)
    attention = [m for m in modules if m.endswith(".self_attention.linear_proj")]
    for module in [*modules, *(m.replace("linear_proj", "core_attention") for m in attention)]:
        key, index = stacked(module + ".")
        offsets = ".".join(str(i) for i in index or (0,))
        sizes = ".".join(str(end + 1) for end in ends[len(index)])
        yield f"{key}_extra_state/shard_{offsets}_{sizes}"
