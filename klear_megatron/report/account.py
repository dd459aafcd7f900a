"""What runs cost: time, devices, tokens, FLOPs, memory, and money if a price is given."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klear_megatron.errors import UserError
from klear_megatron.observability import read_usage
from klear_megatron.observability.usage import (
    Start,
    device_hours,
    name_devices,
    short_number,
    start_of,
)
from klear_megatron.planning import PlannedModel
from klear_megatron.report.runs import Run

_NOTE = (
    "Of the steps that a training run kept, and of the drawing of an evaluation; not of loading, "
    "starting servers or grading, nor of steps that were lost to a crash. GPUs are those of the "
    "ranks and of all servers, also while they wait. Without GPUs, core hours are the hours times "
    "the cores of the ranks' hosts. FLOPs are the model's: training, forward passes for "
    "log-probabilities, and generation, as docs/metrics.md counts them. Evaluations between steps "
    "of training are in its time, but not in its tokens and FLOPs. MFU is that of the optimizer "
    "steps."
)


@dataclass(frozen=True)
class _Cost:
    run: int | None
    """Its number on the page; None for the sum of all."""
    devices: str
    hours: float
    gpu_hours: float | None
    """None where it is not known what the run used."""
    core_hours: float | None
    """Of a run without any GPU."""
    generated: float
    trained: float
    flops: float | None
    mfu: float | None
    peak_gib: float | None

    def row(self, price: float | None) -> list[Any]:
        used = None
        if self.gpu_hours is not None:
            used = f"{short_number(self.gpu_hours)} GPU h"
        elif self.core_hours is not None:
            used = f"{short_number(self.core_hours)} core h"
        cells: list[Any] = [self.run, self.devices or None, _duration(self.hours), used]
        if price is not None:
            cells.append(None if self.gpu_hours is None else f"{self.gpu_hours * price:,.2f}")
        cells += [self.generated or None, self.trained or None]
        cells.append(f"{self.flops:.2e}" if self.flops else None)
        cells.append(f"{100 * self.mfu:.1f} %" if self.mfu is not None else None)
        return [*cells, self.peak_gib]


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.2f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def account(runs: Sequence[Run], price: float | None = None) -> dict[str, Any]:
    """The table of the costs of training runs and evaluations, for the page.

    Args:
        price: of a GPU hour.
    """
    costs = [cost for number, run in enumerate(runs) if (cost := _cost(number, run)) is not None]
    if len(costs) > 1:
        costs.append(_sum_of(costs))
    money = ["money"] if price is not None else []
    return {
        "head": [
            "run",
            "on",
            "time",
            "device time",
            *money,
            "tokens generated",
            "tokens trained",
            "FLOPs",
            "MFU",
            "peak memory, GiB",
        ],
        "rows": [cost.row(price) for cost in costs],
        "note": _NOTE,
    }


def _cost(number: int, run: Run) -> _Cost | None:
    starts = list(read_usage(run.folder))
    if run.kind == "evaluation":
        return _cost_of_evaluation(number, run, starts) if starts else None
    if not run.curves:
        return None
    steps, seconds = run.curves.get("seconds/total", ([], []))
    saving = dict(zip(*run.curves.get("seconds/save", ([], [])), strict=True))
    timed = [
        (start_of(step, starts), (s or 0.0) + (saving.get(step) or 0.0))
        for step, s in zip(steps, seconds, strict=True)
    ]
    flops = [_sum(run, name) for name in run.curves if name.startswith("flops/")]
    return _Cost(
        number,
        name_devices([start for start, _ in timed if start is not None]),
        math.fsum(s for _, s in timed) / 3600,
        *device_hours(timed),
        generated=_sum(run, "rollout/tokens"),
        trained=math.fsum(r * s for r, s in _trained(run, "throughput/trained_per_second")),
        flops=math.fsum(flops) or None,
        mfu=_mean_mfu(run),
        peak_gib=max(_values(run, "memory/peak_gib"), default=None),
    )


def _cost_of_evaluation(number: int, run: Run, starts: Sequence[Start]) -> _Cost:
    timed = [(start, start["seconds"]) for start in starts]
    tokens, squares = (
        sum(start[f"sequence_{name}"] for start in starts) for name in ("tokens", "squares")
    )
    try:
        flops = PlannedModel.read(Path(run.model)).forward_flops(tokens, squares)
    except UserError:  # the model is not there any more
        flops = None
    return _Cost(
        number,
        name_devices(starts),
        math.fsum(s for _, s in timed) / 3600,
        *device_hours(timed),
        generated=sum(start["tokens"] for start in starts),
        trained=0,
        flops=flops,
        mfu=None,
        peak_gib=None,
    )


def _sum_of(costs: Sequence[_Cost]) -> _Cost:
    def total(value: Callable[[_Cost], float | None]) -> float | None:
        """None if it is not known of a run."""
        values = [value(cost) for cost in costs]
        return None if None in values else math.fsum(v for v in values if v is not None)

    return _Cost(
        None,
        "",
        math.fsum(cost.hours for cost in costs),
        total(lambda cost: cost.gpu_hours),
        total(lambda cost: cost.core_hours),
        generated=math.fsum(cost.generated for cost in costs),
        trained=math.fsum(cost.trained for cost in costs),
        flops=total(lambda cost: cost.flops),
        mfu=None,
        peak_gib=max((cost.peak_gib for cost in costs if cost.peak_gib), default=None),
    )


def _mean_mfu(run: Run) -> float | None:
    timed = list(_trained(run, "throughput/mfu"))
    seconds = math.fsum(s for _, s in timed)
    return math.fsum(mfu * s for mfu, s in timed) / seconds if seconds else None


def _trained(run: Run, metric: str) -> Iterator[tuple[float, float]]:
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
