"""An output folder that appears under its name only when it is complete, and can be resumed.

Files are written in `<out>.partial`. Each gets its final name there once all its bytes are on the
disk, together with a receipt under `.receipts/`; whatever is left without one was being written
when the process ended, and is written again.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from klear_megatron.errors import UserError

_RECEIPTS = ".receipts"
_PLAN = "plan.json"


class Staging:
    """The folder in the making.

    Args:
        plan: what is being written, from what; JSON-like. Only the same plan is resumed.
        needed_bytes: of all files together.

    Raises:
        UserError: `out` exists; nothing to resume, or another plan's; not enough space.
    """

    def __init__(self, out: Path, plan: dict[str, Any], *, needed_bytes: int, resume: bool) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._receipts = self.partial / _RECEIPTS
        if out.exists():
            raise UserError(f"{out}: exists already; remove it or choose another output")
        plan_file = self._receipts / _PLAN
        plan = json.loads(json.dumps(plan))
        if resume and plan_file.is_file():
            if json.loads(plan_file.read_text()) != plan:
                raise UserError(
                    f"{self.partial}: begun from another input or with other options; "
                    "run again without --resume to begin anew"
                )
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._receipts.mkdir(parents=True)
            _write_durably(plan_file, json.dumps(plan).encode())
        written = sum(f.stat().st_size for f in self.partial.iterdir() if f.is_file())
        free = shutil.disk_usage(self.partial).free
        if free < needed_bytes - written:
            raise UserError(
                f"{out}: {(needed_bytes - written) / 1e9:.2f} GB are to be written, but only "
                f"{free / 1e9:.2f} GB are free on that disk"
            )

    def receipt(self, name: str) -> Any | None:
        """What `write` returned for this file, if it is complete."""
        receipt = self._receipts / f"{name}.json"
        return json.loads(receipt.read_text()) if receipt.is_file() else None

    def write(self, name: str, body: Callable[[BinaryIO], Any]) -> None:
        """Writes a file; `receipt` will give what `body` returned (JSON-like).

        Raises:
            UserError: the disk is full.
        """
        unfinished = self._receipts / f"{name}.unfinished"
        try:
            with unfinished.open("wb") as file:
                receipt = body(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(self.partial / name)
            _write_durably(self._receipts / f"{name}.json", json.dumps(receipt).encode())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            unfinished.unlink(missing_ok=True)
            raise UserError(
                f"{self.partial / name}: {error.strerror}; make room, then run again with --resume"
            ) from error

    def commit(self) -> None:
        """Gives the folder its name."""
        shutil.rmtree(self._receipts)
        _sync_folder(self.partial)
        self.partial.rename(self.out)
        _sync_folder(self.out.absolute().parent)


def _write_durably(path: Path, content: bytes) -> None:
    """All of it or nothing, whatever happens."""
    temporary = path.with_name(path.name + ".unfinished")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
