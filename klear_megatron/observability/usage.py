"""What each start of a run used, in usage.jsonl: what the account of the run is made of."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klear_megatron.platform.files import complete_lines

_FILE = "usage.jsonl"

Start = dict[str, Any]
"""A line of usage.jsonl."""


def append_usage(run_dir: Path, **used: Any) -> None:
    """Adds the line of one start, with the time of writing it.

    Args:
        used: see docs/tracking.md.
    """
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **used}
    with (run_dir / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_usage(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines in the order of the starts; none of a run of an older version."""
    yield from map(json.loads, complete_lines(run_dir / _FILE))


def used_until(run_dir: Path, seconds: Mapping[int, float]) -> str | None:
    """What the steps of a training run used, such as `12.5 GPU h on 8 × NVIDIA H100`.

    Args:
        seconds: step -> how long it took.

    Returns:
        None where it is not known.
    """
    starts = list(read_usage(run_dir))
    timed = [(start_of(step, starts), taken) for step, taken in seconds.items()]
    gpu_hours, core_hours = device_hours(timed)
    if gpu_hours is None and core_hours is None:
        return None
    on = name_devices([start for start, _ in timed if start is not None])
    if gpu_hours is not None:
        return f"{short_number(gpu_hours)} GPU h on {on}"
    return f"{short_number(core_hours or 0.0)} core h on {on}"


def start_of(step: int, starts: Sequence[Start]) -> Start | None:
    """The start that took this step as the run kept it: the last one that began no later. What is
    done before the first step is of the first start. None if no start is known."""
    begun = [start for start in starts if start["first_step"] <= max(step, 1)]
    return begun[-1] if begun else None


def device_hours(
    timed: Sequence[tuple[Start | None, float]],
) -> tuple[float | None, float | None]:
    """GPU hours, and for a run without any GPU core hours instead."""
    if not timed or any(start is None for start, _ in timed):
        return None, None
    gpus = math.fsum(_gpus(start) * s for start, s in timed if start is not None) / 3600
    if gpus:
        return gpus, None
    return None, math.fsum(start["cores"] * s for start, s in timed if start is not None) / 3600


def _gpus(start: Start) -> int:
    return sum(
        count
        for part in ("ranks", "servers")
        for device, count in start[part].items()
        if device != "CPU"
    )


def name_devices(starts: Sequence[Start]) -> str:
    """What the starts ran on, each kind once: `16 × NVIDIA H100, servers 8 × GPU`."""
    return " / ".join(dict.fromkeys(map(_devices_of, starts)))


def _devices_of(start: Start) -> str:
    ranks, servers = (
        " + ".join(f"{count} × {device}" for device, count in start[part].items())
        for part in ("ranks", "servers")
    )
    parts = [ranks] if ranks else []
    parts += [f"servers {servers}"] if servers else []
    if not _gpus(start):
        parts.append(f"{start['cores']} cores")
    return ", ".join(parts)


def short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
