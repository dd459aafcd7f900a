"""Carrying out a plan: file after file, alone or shared with torchrun's other processes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from klear_megatron.conversion.dtypes import dtype_name
from klear_megatron.conversion.plan import Move
from klear_megatron.conversion.processes import Processes
from klear_megatron.conversion.progress import Progress
from klear_megatron.conversion.staging import Staging

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
    if processes.rank == 0:
        staging = Staging(out, plan, needed_bytes=sum(nbytes.values()), resume=resume)
    processes.wait()
    if processes.rank > 0:
        staging = Staging(out, plan, needed_bytes=0, resume=True)

    mine = list(files)[processes.rank :: processes.size]
    with Progress(sum(nbytes[name] for name in mine), enabled=processes.rank == 0) as progress:
        for name in mine:
            if staging.receipt(name) is None:
                staging.write(name, partial(write, files[name], progress))
            else:
                progress.skip(nbytes[name])
    processes.wait()
    if processes.rank == 0:
        receipts = {name: staging.receipt(name) for name in files}
        staging.finish(lambda folder: finish(folder, receipts))
        progress.summary(out)
    processes.wait()
