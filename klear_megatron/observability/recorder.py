"""A run's metrics, as TensorBoard scalars and in metrics.jsonl."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from klear_megatron.errors import Stopped
from klear_megatron.observability.metric import Metric
from klear_megatron.observability.progress import say
from klear_megatron.platform.files import complete_lines

METRICS = (
    Metric(
        "progress/wall_time",
        "s",
        "time spent so far on the steps that the run kept, evaluations and saves included, but not "
        "the starts: steps lost to a crash are left out",
    ),
)


class Tracker(Protocol):
    """A place for metrics outside the run directory."""

    name: str

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step, all finite. A step may come again after a checkpoint."""

    def close(self, *, failed: bool) -> None:
        """The run has ended, or its process has."""


class Recorder:
    """Writes a run's metrics, and `progress/wall_time`; a context manager, for one rank only.

    A tracker that fails costs its numbers and not the run: it is left out from then on.

    Args:
        next_step: first step to be written; rows of a resumed run from there on are dropped.
        trackers: get the same metrics.
    """

    def __init__(
        self, run_dir: Path, *, next_step: int = 1, trackers: Sequence[Tracker] = ()
    ) -> None:
        # It is slow to import, and everything imports this package.
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in complete_lines(self._path) if json.loads(line)["step"] < next_step]
        self._path.write_text("".join(kept))
        last = json.loads(kept[-1]) if kept else {}
        self._spent = last.get("progress/wall_time", 0.0) + last.get("seconds/save", 0.0)
        self._start = time.monotonic()
        self._file = self._path.open("r+")
        self._file.seek(0, os.SEEK_END)
        self._row: dict[str, float | None] = {}
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=next_step)
        self._trackers = list(trackers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row of metrics and flushes it. A number that is not finite becomes null."""
        wall_time = self._spent + time.monotonic() - self._start
        self._step, self._place, self._row = step, self._file.tell(), {}
        self.add({**metrics, "progress/wall_time": wall_time})

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the row that was written last."""
        self._row |= {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.seek(self._place)
        # Not shorter than what is there, and written in one piece.
        self._file.write(json.dumps({"step": self._step, **self._row}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, self._step)
        self._tensorboard.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers.copy():
            try:
                tracker.write(self._step, finite)
            except Exception as error:
                self._trackers.remove(tracker)
                say(
                    f"step {self._step}: {tracker.name} does not take metrics and gets no more "
                    f"until the run is started again; {self._path} has them: {error}"
                )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._file.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None and not issubclass(kind, Stopped))
