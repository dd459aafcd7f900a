"""Plans that `klear-megatron plan --json` printed, and those of runs beside what they took."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from klear_megatron.planning.report import short_layout
from klear_megatron.planning.run import PLAN
from klear_megatron.report.runs import Run

_SHOWN = 12
"""Plans of one search, the fastest first."""


def read_plans(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows about plans: each one, and the steps that were measured beside theirs."""
    plans, steps = [], []
    for number, run in enumerate(runs):
        plans += [_row(number, planned) for planned in run.plans[:_SHOWN]]
        path = run.folder / PLAN
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            plans.append(_row(number, record["plan"]))
            steps += [{"run": number, **step} for step in record["steps"]]
    return {"plans": plans, "steps": steps}


def _row(run: int, planned: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": run,
        "layout": short_layout(planned["layout"]),
        "fits": planned["fits"],
        "gib": dict(_without_total(planned["memory_bytes"], 2**30)),
        "seconds": dict(_without_total(planned["step_seconds"], 1)),
        "speed": planned["tokens_per_second_per_gpu"],
        "mfu": planned["mfu"],
    }


def _without_total(kinds: dict[str, float], unit: float) -> Iterator[tuple[str, float]]:
    return ((kind, value / unit) for kind, value in kinds.items() if kind != "total")
