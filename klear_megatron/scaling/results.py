"""The results of points: a file each, which a resumed experiment keeps, and tables of them all."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klear_megatron.platform.files import make_folder, write_atomically
from klear_megatron.scaling.config import Point, ScalingConfig

Row = dict[str, Any]

MEASURED = "measured"
OUT_OF_MEMORY = "out of memory"
OUT_OF_TIME = "out of time"
FAILED = "failed"
"""It ended in another error, so a resumed experiment tries it again."""


def folder(config: ScalingConfig) -> Path:
    """Where each point has a result and a log."""
    return config.run_dir / "points"


def record(config: ScalingConfig, point: Point, outcome: str, reason: str, numbers: Row) -> Row:
    """Writes and returns the result of a point: what it is, what came out, and all settings."""
    row = {
        "length": point.length,
        "layout": point.layout,
        "variant": point.variant,
        "ranks": point.ranks,
        "sequences": point.sequences,
        "outcome": outcome,
        "reason": reason,
        **numbers,
        "settings": _settings(config, point),
    }
    path = _path(config, point)
    make_folder(path.parent)
    # Several ranks may run out of memory at once: each writes a file of its own first.
    mine = path.with_suffix(f".{os.getpid()}")
    with write_atomically(mine) as file:
        json.dump(row, file)
    mine.replace(path)
    return row


def record_out_of_time(config: ScalingConfig, point: Point, numbers: Row) -> Row:
    """As `record`, for a point that was ended at its time limit."""
    reason = f"not finished after {config.time_limit_s:g} s"
    return record(config, point, OUT_OF_TIME, reason, numbers)


def read(config: ScalingConfig, point: Point) -> Row | None:
    """The result of a point; None if it has none, or one that was made with other settings."""
    path = _path(config, point)
    if not path.exists():
        return None
    row: Row = json.loads(path.read_text(encoding="utf-8"))
    return row if row["settings"] == _settings(config, point) else None


def read_kept(config: ScalingConfig, point: Point) -> Row | None:
    """The result of a point, if it need not be measured again."""
    row = read(config, point)
    return None if row is None or row["outcome"] == FAILED else row


def write_tables(run_dir: Path, rows: Sequence[Row]) -> None:
    """results.jsonl has everything, results.csv what is neither a list nor a mapping, and
    summary.md the fastest layouts."""
    with write_atomically(run_dir / "results.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with write_atomically(run_dir / "results.csv") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(flat)
    with write_atomically(run_dir / "summary.md") as file:
        file.write(summary(rows))


def fastest(rows: Sequence[Row], prefix: str = "") -> dict[tuple[int, int], Row]:
    """(length, ranks) -> the point with the most tokens per second among those measured.

    Args:
        prefix: `planned_` for the one that was planned to have the most.
    """
    found: dict[tuple[int, int], Row] = {}
    for row in rows:
        place = row["length"], row["ranks"]
        speed = f"{prefix}tokens_per_second_per_gpu"
        if row["outcome"] == MEASURED and row[speed] > found.get(place, {speed: 0})[speed]:
            found[place] = row
    return found


def summary(rows: Sequence[Row]) -> str:
    """A table in Markdown: for each length and number of ranks, the fastest layout and variant.

    Where its name changes from one length to the next, context parallelism or recomputation begins
    to pay, or stops.
    """
    lines = [
        "| tokens | ranks | fastest | tokens/s per rank | planned to be fastest | no measurement |",
        "|---|---|---|---|---|---|",
    ]
    measured, planned = fastest(rows), fastest(rows, "planned_")
    for length, ranks in sorted({(row["length"], row["ranks"]) for row in rows}):
        here = [row for row in rows if (row["length"], row["ranks"]) == (length, ranks)]
        lost = [f"{label(row)}: {row['outcome']}" for row in here if row["outcome"] != MEASURED]
        best = measured.get((length, ranks))
        cells = ["", "", ""]
        if best is not None:
            speed = best["tokens_per_second_per_gpu"]
            cells = [label(best), f"{speed:,.0f}", label(planned[length, ranks])]
        lines.append("| " + " | ".join([f"{length:,}", str(ranks), *cells, "; ".join(lost)]) + " |")
    return "\n".join(lines) + "\n"


def label(row: Row) -> str:
    """The layout and the variant of a point."""
    return f"{row['layout']}, {row['variant']}"


def _path(config: ScalingConfig, point: Point) -> Path:
    return folder(config) / f"{point.name}.json"


def _settings(config: ScalingConfig, point: Point) -> Row:
    """All that decides a point's result, besides the machine and the versions."""
    shared = ("seed", "steps", "time_limit_s", "memory_limit_gib")
    return {
        **{name: getattr(config, name) for name in shared},
        "ranks": point.ranks,
        "lengths": list(point.lengths),
        "policy": point.policy.model_dump(mode="json"),
    }
