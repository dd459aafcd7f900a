"""What runs cost."""

import math
from collections.abc import Sequence
from typing import Any

from klear_megatron.report.runs import Run


def account(runs: Sequence[Run]) -> dict[str, Any]:
    """The table of the training runs' costs."""
    return {
        "head": ["run", "hours", "tokens generated"],
        "rows": [
            [number, _sum(run, "seconds/total") / 3600, _sum(run, "rollout/tokens") or None]
            for number, run in enumerate(runs)
            if run.curves
        ],
        "note": "Of the steps that the run kept: what a killed run did after its last checkpoint "
        "is not in it.",
    }


def _sum(run: Run, metric: str) -> float:
    _, values = run.curves.get(metric, ([], []))
    return math.fsum(value or 0.0 for value in values)
