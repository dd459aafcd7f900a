"""A run's metrics, as TensorBoard scalars and in metrics.jsonl."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from klear_megatron.observability.metric import Metric

METRICS = (
    Metric(
        "progress/wall_time",
        "s",
        "time spent so far on the steps that the run kept, evaluations and saves included, but not "
        "the starts: steps lost to a crash are left out",
    ),
)


class Recorder:
    """Writes a run's metrics, and `progress/wall_time`; a context manager, for one rank only.

    Args:
        next_step: first step to be written; rows of a resumed run from there on are dropped.
    """

    def __init__(self, run_dir: Path, *, next_step: int = 1) -> None:
        # It is slow to import, and everything imports this package.
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] < next_step]
        self._path.write_text("".join(kept))
        self._spent = json.loads(kept[-1]).get("progress/wall_time", 0.0) if kept else 0.0
        self._start = time.monotonic()
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=next_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row of metrics and flushes it. A number that is not finite becomes null."""
        wall_time = self._spent + time.monotonic() - self._start
        metrics = {**metrics, "progress/wall_time": wall_time}
        row = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._tensorboard.close()


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # A run that was killed may have left half a line.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
