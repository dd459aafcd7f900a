"""Carrying out a conversion: file after file, alone or shared with torchrun's other processes."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch.distributed as dist

from klear_megatron.checkpoints.dtypes import dtype_name
from klear_megatron.checkpoints.plan import Move
from klear_megatron.conversion.staging import Staging
from klear_megatron.observability import Progress, say

Receipt = Any
"""What to remember of a complete file; JSON-like."""

Item = TypeVar("Item")

_AHEAD = 4
"""Enough to read a large tensor while the small ones beside it are written."""


@dataclass(frozen=True)
class Processes:
    """The processes that share a conversion, and which of them this is."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "Processes":
        """The processes that torchrun started, or this one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(int(os.environ.get("RANK", "0")), size)

    def wait(self) -> None:
        """Returns when all of them have got here."""
        if self.size > 1:
            dist.barrier()


def carry_out(
    files: Mapping[str, Sequence[Move]],
    write: Callable[[Sequence[Move], Progress, BinaryIO], Receipt],
    finish: Callable[[Path, dict[str, Receipt]], None],
    *,
    source: Path,
    out: Path,
    settings: Mapping[str, Any],
    resume: bool,
    processes: Processes,
) -> None:
    """Makes the folder `out`.

    Args:
        files: name -> what the file holds.
        write: writes one of the files.
        finish: writes into the folder what else belongs there, once all files are complete.
        settings: what else the files' content depends on.
    """
    plan = {
        "source": str(source.resolve()),
        "files": sorted([f.name, f.stat().st_size, f.stat().st_mtime] for f in source.iterdir()),
        "moves": {name: [[m.row.name, dtype_name(m.dtype)] for m in files[name]] for name in files},
        **settings,
    }
    nbytes = {name: sum(move.nbytes for move in moves) for name, moves in files.items()}
    start, total, kept = time.monotonic(), sum(nbytes.values()), 0
    with Staging(out) as staging:
        if processes.rank == 0:
            staging.begin(plan, needed_bytes=total, resume=resume)
            kept = sum(nbytes[name] for name in files if staging.receipt(name) is not None)
        processes.wait()
        _write_share(files, nbytes, write, staging, processes)
        processes.wait()
        if processes.rank == 0:
            receipts = {name: staging.receipt(name) for name in files}
            staging.finish(lambda folder: finish(folder, receipts))
            say(_summary(out, total - kept, kept, time.monotonic() - start))
        processes.wait()


def _write_share(
    files: Mapping[str, Sequence[Move]],
    nbytes: Mapping[str, int],
    write: Callable[[Sequence[Move], Progress, BinaryIO], Receipt],
    staging: Staging,
    processes: Processes,
) -> None:
    """Writes the files of this process that are not complete yet."""
    mine = list(files)[processes.rank :: processes.size]
    missing = [name for name in mine if staging.receipt(name) is None]
    title = "convert" if processes.size == 1 else f"convert (1 of {processes.size} processes)"
    with Progress(
        title,
        sum(nbytes[name] for name in mine),
        start=sum(nbytes[name] for name in mine if name not in missing),
        unit="B",
        enabled=processes.rank == 0,
        keep=False,
    ) as progress:
        for name in missing:
            staging.write(name, partial(write, files[name], progress))


def _summary(out: Path, written: int, kept: int, seconds: float) -> str:
    rate = f"{written / 1e9:.3f} GB in {seconds:.1f} s, {written / 1e9 / seconds:.2f} GB/s"
    return f"wrote {out}: {rate}" + (f" (and {kept / 1e9:.3f} GB were there)" if kept else "")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next few while one is in use.

    Reading, copying and checking tensors releases Python's lock, so a second core does it.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = deque(thread.submit(next, iterator, end) for _ in range(_AHEAD))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, iterator, end))
                yield item  # type: ignore[misc]
                del item
        finally:
            thread.shutdown(cancel_futures=True)
