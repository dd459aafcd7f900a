"""Carrying out a plan: file after file, alone or shared with torchrun's other processes."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from klear_megatron.checkpoints.dtypes import dtype_name
from klear_megatron.checkpoints.plan import Move
from klear_megatron.conversion.processes import Processes
from klear_megatron.conversion.staging import Staging
from klear_megatron.observability import Progress, say

Receipt = Any
"""What is to be remembered of a file that is complete; JSON-like."""


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
        files: name -> what is in it.
        write: writes one of them.
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
        processes.wait()
        if processes.rank == 0:
            receipts = {name: staging.receipt(name) for name in files}
            staging.finish(lambda folder: finish(folder, receipts))
            say(_summary(out, total - kept, kept, time.monotonic() - start))
        processes.wait()


def _summary(out: Path, written: int, kept: int, seconds: float) -> str:
    rate = f"{written / 1e9:.3f} GB in {seconds:.1f} s, {written / 1e9 / seconds:.2f} GB/s"
    return f"wrote {out}: {rate}" + (f" (and {kept / 1e9:.3f} GB were there)" if kept else "")
