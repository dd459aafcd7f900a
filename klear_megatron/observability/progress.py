"""Progress on the terminal: a bar where there is one, plain lines where output goes to a file."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm

from klear_megatron.platform import heartbeat

_SECONDS_BETWEEN_LINES = 10.0


def say(message: str) -> None:
    """Prints one line for the user without disturbing a progress bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A context manager that counts up to `total`, if that is known.

    Without a terminal it prints a line every ten seconds, with the time that is left, and one at
    the end. With a `unit`, such as "B" for bytes, it scales counts (kB, MB, ...) and shows the
    speed. `enabled=False` prints nothing, for all ranks but one. `keep=False` leaves nothing on the
    terminal at the end.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        start: int = 0,
        unit: str | None = None,
        enabled: bool = True,
        keep: bool = True,
    ) -> None:
        self._title, self._total, self._done = title, total, start
        self._start, self._unit = start, unit
        self._enabled, self._keep = enabled, keep
        self._note, self._shown_last = "", start
        self._start_time = self._last_line = time.monotonic()
        on_terminal = enabled and sys.stdout.isatty()
        self._bar = (
            tqdm(
                desc=title,
                total=total,
                initial=start,
                unit=unit or "it",
                unit_scale=unit is not None,
                leave=keep,
                file=sys.stdout,
            )
            if on_terminal
            else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`note` is shown beside the count until the next one."""
        heartbeat.beat()
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self, *, goes_on: bool = True) -> None:
        self._last_line, self._shown_last = time.monotonic(), self._done
        elapsed = self._last_line - self._start_time
        count = "/".join(self._shown(n) for n in (self._done, self._total) if n is not None)
        speed = ""
        if self._unit is not None:
            speed = f", {self._shown((self._done - self._start) / elapsed)}/s"
        left = self._left(elapsed) if goes_on else ""
        say(f"{self._title} {count} [{elapsed:.0f} s{speed}{left}] {self._note}".rstrip())

    def _left(self, elapsed: float) -> str:
        """How long the rest takes at the speed so far."""
        done = self._done - self._start
        if self._total is None or not done or self._done >= self._total:
            return ""
        left = timedelta(seconds=round(elapsed / done * (self._total - self._done)))
        return f", {left} left"

    def _shown(self, count: float) -> str:
        return str(count) if self._unit is None else tqdm.format_sizeof(count, self._unit)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled and self._keep and self._shown_last != self._done:
            self._print_line(goes_on=False)
