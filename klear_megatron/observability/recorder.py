"""A run's metrics, as TensorBoard scalars and in metrics.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Recorder:
    """Writes metrics under a run directory; a context manager, for one rank only.

    Args:
        next_step: first step to be written; rows of a resumed run from there on are dropped.
    """

    def __init__(self, run_dir: Path, *, next_step: int = 1) -> None:
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in _lines(self._path) if json.loads(line)["step"] < next_step]
        self._path.write_text("".join(kept))
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=next_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row of metrics and flushes it. A number that is not finite becomes null."""
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
