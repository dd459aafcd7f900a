"""Writing large files at the disk's speed."""

import errno
import fcntl
import io
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_WINDOW = 1 << 25
"""Bytes that go to the disk together."""


class StreamedFile(io.RawIOBase):
    """A new file, whose bytes a thread sends to the disk while more of them are made.

    They go past the page cache, where the file system knows a way: that saves copying gigabytes
    into memory that nobody is about to read, and at the end there is nothing left to wait for.
    What has not been sent by `sync` is lost.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)
        # Of whole pages, as it must be for the way past the cache.
        self._filling, self._other = mmap.mmap(-1, _WINDOW), mmap.mmap(-1, _WINDOW)
        self._filled = self._position = 0
        self._thread = ThreadPoolExecutor(1, "disk")
        self._sending: Future[None] | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        """All of it. Raises OSError, perhaps for what was written before."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        while rest:
            part = rest[: _WINDOW - self._filled]
            self._filling[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            rest = rest[len(part) :]
            if self._filled == _WINDOW:
                self._send()
        self._position += count
        return count

    def sync(self) -> None:
        """Returns when all of it is on the disk. Nothing can be written after it."""
        self._wait()
        # The last bytes are no whole pages.
        fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_WRONLY)
        self._send()
        self._wait()
        os.fsync(self._file)

    def close(self) -> None:
        if not self.closed:
            self._thread.shutdown()
            os.close(self._file)
        super().close()

    def _send(self) -> None:
        self._wait()
        window = memoryview(self._filling)[: self._filled]
        self._sending = self._thread.submit(_write, self._file, window)
        self._filling, self._other, self._filled = self._other, self._filling, 0

    def _wait(self) -> None:
        if self._sending is not None:
            self._sending.result()


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
