"""An output folder that appears under its name only when it is complete, and can be resumed.

Files are written in `<out>.partial`. A file gets its final name there once all its bytes are on the
disk, together with a receipt under `.receipts/`. A file without a receipt was being written when
the process ended, and is written again.
"""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from klear_megatron.conversion.streamed_file import StreamedFile
from klear_megatron.errors import UserError
from klear_megatron.platform.files import sync_to_disk, write_atomically
from klear_megatron.platform.locks import locked

_RECEIPTS = ".receipts"
_PLAN, _LOCK = "plan.json", "lock"


class Staging:
    """The unfinished folder; a context manager.

    One process begins and finishes it, and holds its lock inside the context. The processes that
    share the work only write files.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self._receipts = self.partial / _RECEIPTS
        self._claims = contextlib.ExitStack()

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exception: object) -> None:
        self._claims.close()

    def begin(self, plan: dict[str, Any], *, needed_bytes: int, resume: bool) -> None:
        """Makes the folder, or goes on with that of an interrupted run.

        Args:
            plan: what is being written, from what; JSON-like. Only the same plan is resumed.
            needed_bytes: size of all files together.

        Raises:
            UserError: `out` exists or cannot be made, another process is writing it, the folder
                to resume has another plan, or there is not enough space.
        """
        if self.out.exists():
            raise UserError(f"{self.out}: exists already; remove it or choose another output")
        plan = json.loads(json.dumps(plan))
        plan_file = self._receipts / _PLAN
        try:
            self._claim()
            if not resume or not plan_file.is_file():
                shutil.rmtree(self.partial)
                self._claim()
                with write_atomically(plan_file) as file:
                    json.dump(plan, file)
        except OSError as error:
            raise UserError(
                f"{self.out}: {error.strerror} ({error.filename}); choose another output"
            ) from error
        if json.loads(plan_file.read_text()) != plan:
            raise UserError(
                f"{self.partial}: begun from another input or with other options; "
                "run again without --resume to begin anew"
            )
        written = sum(f.stat().st_size for f in self.partial.iterdir() if f.is_file())
        free = shutil.disk_usage(self.partial).free
        if free < needed_bytes - written:
            raise UserError(
                f"{self.out}: {(needed_bytes - written) / 1e9:.2f} GB are to be written, but only "
                f"{free / 1e9:.2f} GB are free on that disk"
            )

    def _claim(self) -> None:
        """Makes the folder and locks it for this process."""
        self._receipts.mkdir(parents=True, exist_ok=True)
        refusal = (
            f"{self.partial}: another process is writing there; wait for it or choose another "
            "output"
        )
        self._claims.enter_context(locked(self._receipts / _LOCK, refusal))

    def receipt(self, name: str) -> Any | None:
        """What `write` returned for this file; None unless it is complete and unshortened."""
        path, receipt = self.partial / name, self._receipts / f"{name}.json"
        if not receipt.is_file():
            return None
        size, returned = json.loads(receipt.read_text())
        return returned if path.is_file() and path.stat().st_size == size else None

    def write(self, name: str, body: Callable[[BinaryIO], Any]) -> None:
        """Writes a file and keeps the JSON-like value that `body` returns, for `receipt`.

        Raises:
            UserError: the disk is full.
        """
        unfinished = self._receipts / f"{name}.unfinished"
        try:
            with self._disk_may_be_full(), StreamedFile(unfinished) as file:
                receipt = body(cast(BinaryIO, file))
                file.sync()
                size = file.tell()
        except UserError:
            unfinished.unlink(missing_ok=True)
            raise
        with self._disk_may_be_full():
            unfinished.rename(self.partial / name)
            with write_atomically(self._receipts / f"{name}.json") as receipt_file:
                json.dump([size, receipt], receipt_file)

    def finish(self, body: Callable[[Path], None]) -> None:
        """Lets `body` write the rest of the folder's content, and gives the folder its name.

        Raises:
            UserError: the disk is full.
        """
        with self._disk_may_be_full():
            body(self.partial)
            for path in self.partial.rglob("*"):
                sync_to_disk(path)
        shutil.rmtree(self._receipts)
        self.partial.rename(self.out)
        sync_to_disk(self.out)
        sync_to_disk(self.out.absolute().parent)

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
    """Whether this error, or one behind it, is of a full disk; torch.save raises its own on top."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False
