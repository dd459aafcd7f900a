"""Reads records of `torch.save`, which are zip files, from the middle of a larger file."""

import io
import mmap
import zipfile
import zlib
from typing import Any, BinaryIO

import torch
from torch import Tensor


def read_record(file: BinaryIO, position: int, length: int) -> Tensor:
    """The tensor in a record of `torch.save`, after every byte that matters has been checked.

    The data stays in the file; the tensor is a private memory map of it.
    """
    record: Any = Record(file, position, length)
    with zipfile.ZipFile(record) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        data = entries.pop("data/0")
        for entry in entries.values():
            archive.read(entry)  # checks the CRC-32
    record.seek(0)
    form: Tensor = torch.load(record, map_location="meta", weights_only=True)
    storage = form.untyped_storage()
    assert storage._checkpoint_offset is not None  # torch.load sets it for tensors without data
    stored = _map(file, position + storage._checkpoint_offset, storage.nbytes())
    if zlib.crc32(stored.numpy().data) != data.CRC:
        raise ValueError("the checksum does not match")
    if stored.data_ptr() % form.dtype.itemsize:
        stored = stored.clone()
    return stored.view(form.dtype).as_strided(form.shape, form.stride(), form.storage_offset())


def _map(file: BinaryIO, position: int, length: int) -> Tensor:
    """Bytes of a file as a uint8 tensor. The pages are freed together with the tensor."""
    before = position % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(
        file.fileno(), before + length, offset=position - before, access=mmap.ACCESS_COPY
    )
    mapped.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=before, count=length)


class Record(io.RawIOBase):
    """A part of a file, readable like a file."""

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
        with memoryview(buffer)[:size] as part:
            count = self._file.readinto(part)  # type: ignore[attr-defined]
        self._position += count
        return int(count)
