"""Reading the weights of Megatron's distributed checkpoints, without Megatron, ranks or a model.

A checkpoint stores global tensors in chunks, whatever layout wrote it: `.metadata` says which chunk
of which tensor lies where, and each chunk is a record of `torch.save`, a zip file with a CRC-32.
Layers are stacked: layer i of `decoder.layers.{i}.x` is `decoder.layers.x`[i]; so are a layer's
experts, after that.
"""

import io
import math
import mmap
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from klear_megatron.conversion.checksums import check_companions
from klear_megatron.errors import UserError
from klear_megatron.models import Weight


@dataclass(frozen=True)
class Chunk:
    """A hyper-rectangle of a stored tensor, and where its record lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """`decoder.layers.3.x` -> (`decoder.layers.x`, (3,)), with a second index for an expert of a
    layer; other names as they are, with ()."""
    numbered = r"(?:(?<=^decoder\.layers\.)|(?<=\.mlp\.experts\.experts\.))(\d+)\."
    return re.sub(numbered, "", name), tuple(int(number) for number in re.findall(numbered, name))


def full_shape(row: Weight) -> torch.Size:
    """Shape of the row's full Megatron tensor."""
    return row.layout.merge([torch.empty(s, device="meta") for s in row.sources.values()]).shape


class MegatronCheckpoint:
    """The weights in a checkpoint folder of Megatron's `torch_dist` format.

    Raises:
        UserError: not such a folder, or a part of it is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_megatron_checkpoint(path):
            raise UserError(f"{path}: not a Megatron distributed checkpoint (no metadata.json)")
        check_companions(path)
        try:
            metadata = FileSystemReader(path).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}/.metadata: {error}; missing or corrupt") from error
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._chunks: dict[str, list[Chunk]] = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in self._tensors:
                sizes = {c.offsets: c.sizes for c in self._tensors[index.fqn].chunks}
                self._chunks.setdefault(index.fqn, []).append(
                    Chunk(
                        tuple(index.offset),
                        tuple(sizes[index.offset]),
                        info.relative_path,
                        info.offset,
                        info.length,
                    )
                )
        self._check_files()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.position + chunk.length)
        for file, end in ends.items():
            path = self.path / file
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                raise UserError(
                    f"{path}: {size} bytes, but .metadata places data up to byte {end}; "
                    "the file is missing or truncated"
                )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding.

        Raises:
            UserError: there is none.
        """
        entry = self._tensors.get("embedding.word_embeddings.weight")
        if entry is None:
            raise UserError(f"{self.path}: no embedding.word_embeddings.weight in it")
        return entry.size[0]

    def dtype(self, row: Weight) -> torch.dtype:
        """Of the row's tensor as stored."""
        return self._tensors[self._locate(row.name)[0]].properties.dtype

    def check(self, table: Iterable[Weight]) -> None:
        """Compares names and shapes with what the config asks for, reading no weights.

        Raises:
            UserError: listing every missing, unexpected, mis-shaped and incomplete tensor.
        """
        layers: dict[str, set[tuple[int, ...]]] = {}
        problems: list[str] = []
        for row in table:
            key, index = self._locate(row.name)
            if key not in self._tensors:
                problems.append(f"{row.name} is missing")
                continue
            layers.setdefault(key, set()).add(index)
            found = tuple(self._tensors[key].size[len(index) :])
            if found != tuple(full_shape(row)):
                problems.append(
                    f"{row.name}: {found} in the checkpoint, {tuple(full_shape(row))} by the config"
                )
        for key, entry in self._tensors.items():
            if key not in layers:
                problems.append(f"{key} is not in the model")
                continue
            depth = len(next(iter(layers[key])))
            if math.prod(entry.size[:depth]) != len(layers[key]):
                problems.append(
                    f"{key}: {math.prod(entry.size[:depth])} layers in the checkpoint, "
                    f"{len(layers[key])} by the config"
                )
            stored = sum(math.prod(chunk.sizes) for chunk in self._chunks.get(key, []))
            if stored != math.prod(entry.size):
                problems.append(f"{key}: {stored} of {math.prod(entry.size)} numbers are there")
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise UserError(
                f"{self.path}: hf/config.json and the weights do not match\n  "
                + "\n  ".join(problems[:20])
                + more
            )

    def tensor(self, row: Weight) -> Tensor:
        """The row's full Megatron tensor; each chunk is read once, straight into it.

        Raises:
            UserError: a chunk is corrupt.
        """
        key, index = self._locate(row.name)
        shape = self._tensors[key].size[len(index) :]
        mine = [c for c in self._chunks[key] if _covers(c, index)]
        if len(mine) == 1 and mine[0].sizes[len(index) :] == tuple(shape):
            return self._read(key, mine[0])[self._inside(mine[0], index)]
        full = torch.empty(shape, dtype=self._tensors[key].properties.dtype)
        for chunk in mine:
            place = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )[len(index) :]
            full[place] = self._read(key, chunk)[self._inside(chunk, index)]
        return full

    def _locate(self, name: str) -> tuple[str, tuple[int, ...]]:
        # Models whose layers differ from one another keep the number in the name.
        return (name, ()) if name in self._tensors else stacked(name)

    @staticmethod
    def _inside(chunk: Chunk, index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - start for i, start in zip(index, chunk.offsets, strict=False))

    def _read(self, key: str, chunk: Chunk) -> Tensor:
        path = self.path / chunk.file
        where = f"{path}: {key} at byte {chunk.position}"
        try:
            with path.open("rb") as file:
                tensor = _read_record(file, chunk.position, chunk.length)
        except _CORRUPT as error:
            raise UserError(f"{where}: {error}; the file is corrupt") from error
        if tensor.shape != chunk.sizes or tensor.dtype != self._tensors[key].properties.dtype:
            raise UserError(f"{where}: {tensor.dtype} {tuple(tensor.shape)}, unlike .metadata says")
        return tensor


def _covers(chunk: Chunk, index: tuple[int, ...]) -> bool:
    """Whether the chunk has a part of the row at `index` of the leading, stacked dimensions."""
    return all(
        start <= i < start + size
        for i, start, size in zip(index, chunk.offsets, chunk.sizes, strict=False)
    )


_CORRUPT = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError)
"""What reading a damaged record raises."""


def _read_record(file: BinaryIO, position: int, length: int) -> Tensor:
    """The tensor of a record of `torch.save`, whose every byte that matters has been checked.

    Its numbers stay in the file, of which they are a private map.
    """
    record: Any = _Record(file, position, length)
    with zipfile.ZipFile(record) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        data = entries.pop("data/0")
        for entry in entries.values():
            archive.read(entry)  # compares it with its checksum
    record.seek(0)
    form: Tensor = torch.load(record, map_location="meta", weights_only=True)
    storage = form.untyped_storage()
    stored = _map(file, position + storage._checkpoint_offset, storage.nbytes())
    if zlib.crc32(stored.numpy().data) != data.CRC:
        raise ValueError("the checksum does not match")
    if stored.data_ptr() % form.dtype.itemsize:
        stored = stored.clone()
    return stored.view(form.dtype).as_strided(form.shape, form.stride(), form.storage_offset())


def _map(file: BinaryIO, position: int, length: int) -> Tensor:
    """Bytes of a file, as a tensor of uint8. Their pages are given back together with it."""
    before = position % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(
        file.fileno(), before + length, offset=position - before, access=mmap.ACCESS_COPY
    )
    mapped.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=before, count=length)


class _Record(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._length - self._position)
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:size])  # type: ignore[attr-defined]
        self._position += count
        return int(count)


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether the folder says that it is a Megatron distributed checkpoint."""
    return (path / "metadata.json").is_file()
