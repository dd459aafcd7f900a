"""Reading the weights of Megatron's distributed checkpoints, without Megatron, ranks or a model.

A checkpoint stores global tensors in chunks, whatever layout wrote it: `.metadata` says which chunk
of which tensor lies where, and each chunk is a record of `torch.save`, a zip file with a CRC-32.
Layers are stacked along the first dimension: `decoder.layers.{i}.x` is `decoder.layers.x`[i]. A
layer's experts are stacked along the second. Other writers than this package may number the layers
instead, the experts of a layer too, and may store the halves of a gated matrix by themselves, as
`x_w` and `x_v`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import PretrainedConfig

from klear_megatron.checkpoints.checksums import check_companions
from klear_megatron.checkpoints.megatron_folder import check_backend, is_megatron_checkpoint
from klear_megatron.checkpoints.metadata import read_metadata
from klear_megatron.checkpoints.records import read_record
from klear_megatron.errors import UserError
from klear_megatron.models import Weight, get_architecture
from klear_megatron.models.mapping import GatedMLP


@dataclass(frozen=True)
class StoredChunk:
    """A hyper-rectangle of a stored tensor, and the location of its record."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True)
class _Stored:
    """A tensor in a checkpoint."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[StoredChunk]


_LAYER = r"(?<=^decoder\.layers\.)\d+\."
_EXPERT = r"(?<=\.mlp\.experts\.experts\.)\d+\."


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """`decoder.layers.3.x` -> (`decoder.layers.x`, (3,)), with a second index for an expert of a
    layer; other names are returned unchanged, with ()."""
    numbered = f"{_LAYER}|{_EXPERT}"
    return re.sub(numbered, "", name), tuple(int(n[:-1]) for n in re.findall(numbered, name))


def full_shape(row: Weight) -> torch.Size:
    """Shape of the row's full Megatron tensor."""
    return row.mapping.merge([torch.empty(s, device="meta") for s in row.sources.values()]).shape


class MegatronCheckpoint:
    """The weights in a checkpoint folder of Megatron's `torch_dist` format.

    Raises:
        UserError: it is not such a folder, or a part of it is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_megatron_checkpoint(path):
            raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
        check_backend(path)
        check_companions(path)
        try:
            self._tensors = _read_metadata(path)
        except Exception as error:  # a damaged pickle may raise any exception
            raise UserError(f"{path}/.metadata: {error!r}; missing or corrupt") from error
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for stored in self._tensors.values():
            for chunk in stored.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.position + chunk.length)
        for file, end in ends.items():
            path = self.path / file
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                raise UserError(
                    f"{path}: {size} bytes, but .metadata places data up to byte {end}; "
                    "the file is missing or truncated"
                )

    def dtype(self, row: Weight) -> torch.dtype:
        """The dtype in which the row's tensor is stored."""
        return self._tensors[self._locate(row)[0][0]].dtype

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding, including padding.

        Raises:
            UserError: there is no embedding.
        """
        embedding = self._tensors.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise UserError(f"{self.path}: has no embedding.word_embeddings.weight")
        return embedding.size[0]

    def table(self, hf: PretrainedConfig) -> list[Weight]:
        """The table of the config's architecture, once the names and shapes have been checked.

        Raises:
            UserError: tensors are missing, unexpected, mis-shaped or incomplete; lists up to 20.
        """
        if self.vocabulary_rows < hf.vocab_size:
            raise UserError(
                f"{self.path}: embedding.word_embeddings.weight has {self.vocabulary_rows} rows, "
                f"fewer than config.json's vocab_size, {hf.vocab_size}"
            )
        table = list(get_architecture(hf).weights(hf, self.vocabulary_rows))
        self._check(table)
        return table

    def _check(self, table: Iterable[Weight]) -> None:
        layers: dict[str, set[tuple[int, ...]]] = {}
        problems: list[str] = []
        for row in table:
            keys, index = self._locate(row)
            if missing := [key for key in keys if key not in self._tensors]:
                name = row.name if len(keys) == 1 else missing[0]
                problems.append(f"{name} is missing")
                continue
            for key in keys:
                layers.setdefault(key, set()).add(index)
            parts = [self._tensors[key].size[len(index) :] for key in keys]
            found = (sum(part[0] for part in parts), *parts[0][1:])
            if found != tuple(full_shape(row)):
                problems.append(
                    f"{row.name}: {found} in the checkpoint, {tuple(full_shape(row))} by the config"
                )
        for key, stored in self._tensors.items():
            if key not in layers:
                problems.append(f"{key} is not in the model")
                continue
            depth = len(next(iter(layers[key])))
            if math.prod(stored.size[:depth]) != len(layers[key]):
                problems.append(
                    f"{key}: {math.prod(stored.size[:depth])} layers in the checkpoint, "
                    f"{len(layers[key])} by the config"
                )
            if not _make_up(stored.chunks, stored.size):
                problems.append(f"{key}: its pieces leave gaps or overlap")
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(
                f"{self.path}: config.json and the weights do not match\n  "
                + "\n  ".join(problems[:20])
                + more
            )

    def tensor(self, row: Weight) -> Tensor:
        """The row's full Megatron tensor; each chunk is read once, straight into it.

        Raises:
            UserError: a chunk is corrupt.
        """
        keys, index = self._locate(row)
        parts = [self._stored_tensor(key, index) for key in keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored_tensor(self, key: str, index: tuple[int, ...]) -> Tensor:
        """A stored tensor, or the part of it at `index` along its leading, stacked dimensions."""
        stored = self._tensors[key]
        shape = stored.size[len(index) :]
        mine = [c for c in stored.chunks if _covers(c, index)]
        if len(mine) == 1 and mine[0].sizes[len(index) :] == shape:
            return self._read(key, mine[0])[self._inside(mine[0], index)]
        full = torch.empty(shape, dtype=stored.dtype)
        for chunk in mine:
            place = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )[len(index) :]
            full[place] = self._read(key, chunk)[self._inside(chunk, index)]
        return full

    def _locate(self, row: Weight) -> tuple[list[str], tuple[int, ...]]:
        """The keys of the row's tensor, or of its halves, and the index where it is stacked."""
        name, (stacked_name, index) = row.name, stacked(row.name)
        places = {  # the last one is what is missing where there is none
            name: (),
            re.sub(_EXPERT, "", name): index[1:],
            stacked_name: index,
        }
        for key, at in places.items():
            if key in self._tensors:
                return [key], at
            halves = [key + "_w", key + "_v"]
            if isinstance(row.mapping, GatedMLP) and any(h in self._tensors for h in halves):
                return halves, at
        return [stacked_name], index

    @staticmethod
    def _inside(chunk: StoredChunk, index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - start for i, start in zip(index, chunk.offsets, strict=False))

    def _read(self, key: str, chunk: StoredChunk) -> Tensor:
        path = self.path / chunk.file
        where = f"{path}: {key} at byte {chunk.position}"
        try:
            with path.open("rb") as file:
                tensor = read_record(file, chunk.position, chunk.length)
        except Exception as error:  # a damaged zip file may raise any exception
            raise UserError(f"{where}: {error!r}; the file is corrupt") from error
        if tensor.shape != chunk.sizes or tensor.dtype != self._tensors[key].dtype:
            raise UserError(f"{where}: {tensor.dtype} {tuple(tensor.shape)} contradicts .metadata")
        return tensor


_NOT_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\.|(random_states|rng_state|rerun_state_machine_state|common_state)/"
    r"|.*\._extra_state\d*(/|$)"
)
"""What else a training checkpoint keeps. Transformer Engine's extra states are scales of FP8, which
it finds anew; weights are stored without them."""


def _read_metadata(path: Path) -> dict[str, _Stored]:
    """All tensors and objects by stored name, except those known not to belong to the model."""
    metadata = read_metadata(path)
    tensors: dict[str, _Stored] = {}
    sizes: dict[tuple[str, torch.Size], tuple[int, ...]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if _NOT_WEIGHTS.match(key):
            continue
        if isinstance(entry, TensorStorageMetadata):
            tensors[key] = _Stored(tuple(entry.size), entry.properties.dtype, [])
            sizes |= {(key, chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        else:
            tensors[key] = _Stored((), torch.uint8, [])
    for index, info in metadata.storage_data.items():
        if (index.fqn, index.offset) in sizes:
            chunk = StoredChunk(
                tuple(index.offset),
                sizes[index.fqn, index.offset],
                info.relative_path,
                info.offset,
                info.length,
            )
            tensors[index.fqn].chunks.append(chunk)
    return tensors


def _make_up(chunks: Sequence[StoredChunk], size: Sequence[int]) -> bool:
    """Whether the chunks, which all start at different places, fill a complete grid."""
    cells = 1
    for dim, end in enumerate(size):
        intervals = sorted({(c.offsets[dim], c.offsets[dim] + c.sizes[dim]) for c in chunks})
        edges = [0, *(stop for _, stop in intervals)]
        if [start for start, _ in intervals] != edges[:-1] or edges[-1] != end:
            return False
        cells *= len(intervals)
    return cells == len(chunks)


def _covers(chunk: StoredChunk, index: tuple[int, ...]) -> bool:
    """Whether the chunk overlaps the row at `index` along the leading, stacked dimensions."""
    return all(
        start <= i < start + size
        for i, start, size in zip(index, chunk.offsets, chunk.sizes, strict=False)
    )
