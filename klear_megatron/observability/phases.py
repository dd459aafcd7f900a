"""Seconds per phase of a training step."""

import contextlib
import time
from collections.abc import Iterator

from klear_megatron.platform import heartbeat


class Phases:
    """Adds up the wall-clock seconds spent in each named phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        heartbeat.begin(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    def take(self) -> dict[str, float]:
        """`seconds/PHASE` and `seconds/total` since the last call; starts again at 0."""
        now = time.perf_counter()
        metrics = {f"seconds/{name}": value for name, value in self._seconds.items()}
        metrics["seconds/total"] = now - self._start
        self._seconds, self._start = {}, now
        return metrics
