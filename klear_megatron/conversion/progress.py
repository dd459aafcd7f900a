"""How far a conversion is, in GB and GB/s."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds. A context manager."""

    def __init__(self, total_bytes: int, *, enabled: bool) -> None:
        self._total, self._written, self._kept = total_bytes, 0, 0
        self._enabled = enabled
        self._start = self._last_line = time.monotonic()
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not on_terminal)

    def advance(self, nbytes: int) -> None:
        """So many more have been written."""
        self._written += nbytes
        self._bar.update(nbytes)
        now = time.monotonic()
        if self._enabled and self._bar.disable and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            done = (self._written + self._kept) / 1e9
            print(f"{done:.1f} of {self._total / 1e9:.1f} GB, {self._rate()}", flush=True)

    def skip(self, nbytes: int) -> None:
        """So many were there from an earlier attempt."""
        self._kept += nbytes
        self._bar.update(nbytes)

    def _rate(self) -> str:
        return f"{self._written / 1e9 / (time.monotonic() - self._start):.2f} GB/s"

    def summary(self, out: Path) -> None:
        """One line, at the end."""
        kept = f" (and {self._kept / 1e9:.3f} GB were there)" if self._kept else ""
        seconds = time.monotonic() - self._start
        print(f"wrote {out}: {self._written / 1e9:.3f} GB in {seconds:.1f} s, {self._rate()}{kept}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
