"""An output folder that appears under its name only when it is complete, and can be resumed.

Files are written in `<out>.partial`. Each gets its final name there once all its bytes are on the
disk, together with a receipt under `.receipts/`; whatever is left without one was being written
when the process ended, and is written again.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from klear_megatron.conversion.streamed_file import StreamedFile
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
            with self._disk_may_be_full(), StreamedFile(unfinished) as file:
                receipt = body(cast(BinaryIO, file))
                file.sync()
        except UserError:
            unfinished.unlink(missing_ok=True)
            raise
        with self._disk_may_be_full():
            unfinished.rename(self.partial / name)
            _write_durably(self._receipts / f"{name}.json", json.dumps(receipt).encode())

    def finish(self, body: Callable[[Path], None]) -> None:
        """Lets `body` write what else belongs in the folder, and gives the folder its name.

        Raises:
            UserError: the disk is full.
        """
        with self._disk_may_be_full():
            body(self.partial)
            for path in self.partial.rglob("*"):
                _sync(path)
        shutil.rmtree(self._receipts)
        _sync(self.partial)
        self.partial.rename(self.out)
        _sync(self.out.absolute().parent)

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not _says_disk_full(error):
                raise
            raise UserError(
                f"{self.partial}: no space left on the disk; make room, then run again with "
                "--resume"
            ) from error


def _says_disk_full(error: BaseException | None) -> bool:
    """Itself or underneath: torch.save complains of the archive that it could not finish."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


def _write_durably(path: Path, content: bytes) -> None:
    """All of it or nothing, whatever happens."""
    temporary = path.with_name(path.name + ".unfinished")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
