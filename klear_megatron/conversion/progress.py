"""How far a conversion is, in GB and GB/s."""

import sys
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm


class Progress:
    """A bar on a terminal; elsewhere, only the summary."""

    def __init__(self, total_bytes: int) -> None:
        self._bar = tqdm(
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        self._done = self._skipped = 0
        self._start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._seconds = time.monotonic() - self._start

    def advance(self, nbytes: int) -> None:
        """`nbytes` more have been written."""
        self._bar.update(nbytes)
        self._done += nbytes

    def skip(self, nbytes: int) -> None:
        """`nbytes` were there from an earlier attempt."""
        self._bar.update(nbytes)
        self._skipped += nbytes

    def summary(self, out: Path) -> None:
        """One line, after the end."""
        rate = self._done / 1e9 / max(self._seconds, 1e-9)
        kept = f", {self._skipped / 1e9:.3f} GB kept" if self._skipped else ""
        print(
            f"wrote {out}: {self._done / 1e9:.3f} GB in {self._seconds:.1f} s "
            f"({rate:.2f} GB/s){kept}"
        )
