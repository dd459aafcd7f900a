"""What runs cost: time, tokens, memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from klear_megatron.report.runs import Run


def account(runs: Sequence[Run]) -> dict[str, Any]:
    """The table of the training runs' costs, for the page."""
    return {
        "head": ["run", "hours", "tokens generated", "tokens trained", "MFU", "peak memory, GiB"],
        "rows": [
            [
                number,
                _sum(run, "seconds/total") / 3600,
                _sum(run, "rollout/tokens") or None,
                math.fsum(rate * s for rate, s in _timed(run, "throughput/trained_per_second")),
                _mean_mfu(run),
                max(_values(run, "memory/peak_gib"), default=None),
            ]
            for number, run in enumerate(runs)
            if run.curves
        ],
        "note": "Of the steps that the run kept: what a killed run did after its last checkpoint "
        "is not in it. MFU is that of the optimizer steps.",
    }


def _mean_mfu(run: Run) -> float | None:
    timed = list(_timed(run, "throughput/mfu"))
    seconds = math.fsum(s for _, s in timed)
    return math.fsum(mfu * s for mfu, s in timed) / seconds if seconds else None


def _timed(run: Run, metric: str) -> Iterator[tuple[float, float]]:
    """Its values with the seconds that the step's optimizer steps took."""
    training = dict(zip(*run.curves.get("seconds/train", ([], [])), strict=True))
    for step, value in zip(*run.curves.get(metric, ([], [])), strict=True):
        seconds = training.get(step)
        if value is not None and seconds is not None:
            yield value, seconds


def _sum(run: Run, metric: str) -> float:
    return math.fsum(_values(run, metric))


def _values(run: Run, metric: str) -> list[float]:
    _, values = run.curves.get(metric, ([], []))
    return [value for value in values if value is not None]
