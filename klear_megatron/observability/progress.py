"""Progress on the terminal: a bar where there is one, plain lines where output goes to a file."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """One line for the user, without disturbing a bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Counts up to `total`, where it is known; a context manager.

    Without a terminal it prints a line every ten seconds and one at the end. `enabled=False`
    prints nothing, for all ranks but one; `keep=False` leaves nothing behind at the end.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        start: int = 0,
        enabled: bool = True,
        keep: bool = True,
    ) -> None:
        self._title, self._total, self._done = title, total, start
        self._enabled, self._keep = enabled, keep
        self._note = ""
        self._start_time = self._last_line = time.monotonic()
        on_terminal = enabled and sys.stdout.isatty()
        self._bar = (
            tqdm(desc=title, total=total, initial=start, leave=keep, file=sys.stdout)
            if on_terminal
            else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`note` is shown beside the count until the next one."""
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start_time
        count = f"{self._done}/{self._total}" if self._total is not None else f"{self._done}"
        say(f"{self._title} {count} [{elapsed:.0f} s] {self._note}".rstrip())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._keep:
            self._print_line()
