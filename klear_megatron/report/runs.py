"""Reads what the folder of a run says about it."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klear_megatron.config.reading import read_values
from klear_megatron.errors import UserError

Curve = tuple[list[int], list[float | None]]
"""Steps and the values that were written for them; None where a value was not finite."""


_PICTURES = {"scaling": ("scaling.png", "ranks.png"), "probe": ("probe.png",)}
"""The runs that draw their own pictures: kind -> the files, of which the first is always there."""


@dataclass(frozen=True)
class Run:
    """One training run, evaluation, scaling experiment or probe, or a file of plans."""

    folder: Path
    name: str
    """The end of its path that tells it from the other runs."""
    kind: str
    """`sft`, `rl`, `evaluation`, `scaling`, `probe` or `plan`."""
    settings: dict[str, Any]
    """Its config, with dotted names."""
    curves: dict[str, Curve]
    """Metrics by name; those of a training run."""
    pictures: tuple[Path, ...] = ()
    """Those of a scaling experiment or a probe."""
    plans: tuple[dict[str, Any], ...] = ()
    """Those of a file that `klear-megatron plan --json` wrote."""

    @property
    def steps(self) -> int | None:
        """The last step with metrics; None without any."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=None)

    @property
    def model(self) -> str:
        return str(self.settings.get("policy.path") or self.settings.get("model") or "")


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads runs in the order given. A folder that is no run stands for the runs in it, which are
    put in the order in which they began.

    Raises:
        UserError: a path holds no run, or a run's files cannot be read.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _run_folders(path)))
    return [
        _read(folder, name) for folder, name in zip(folders, _short_names(folders), strict=True)
    ]


def _run_folders(path: Path) -> list[Path]:
    if _is_run(path) or path.suffix == ".json":
        return [path]
    inside = [folder for folder in path.glob("*") if _is_run(folder)]
    if not inside:
        raise UserError(
            f"{path}: no run there; give the run_dir of sft, rl, eval, scaling or probe, a folder "
            "of them, or a .json file that `plan --json` has printed"
        )
    return sorted(inside, key=lambda folder: (folder / "config.yaml").stat().st_mtime)


def _is_run(folder: Path) -> bool:
    evaluated = (folder / "benchmarks").is_dir()
    return (folder / "config.yaml").is_file() and (
        evaluated or (folder / "metrics.jsonl").is_file() or _draws(folder) is not None
    )


def _draws(folder: Path) -> str | None:
    """The kind of a run that has drawn pictures."""
    kinds = [kind for kind, names in _PICTURES.items() if (folder / names[0]).is_file()]
    return next(iter(kinds), None)


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_one[-length:]) for of_one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        return Run(folder, name, "plan", {}, {}, plans=_plans(folder))
    settings = dict(_flat(read_values(folder / "config.yaml")))
    if (folder / "benchmarks").is_dir():
        return Run(folder, name, "evaluation", settings, {})
    if (kind := _draws(folder)) is not None:
        pictures = [folder / picture for picture in _PICTURES[kind]]
        return Run(folder, name, kind, settings, {}, tuple(p for p in pictures if p.is_file()))
    kind = "rl" if "prompts_per_step" in settings else "sft"
    return Run(folder, name, kind, settings, _curves(folder / "metrics.jsonl"))


def _plans(path: Path) -> tuple[dict[str, Any], ...]:
    """The plan of a file, or those of a search."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    plans = found if isinstance(found, list) else [found]
    if not all(isinstance(plan, dict) and "memory_bytes" in plan for plan in plans):
        raise UserError(f"{path}: has no plans; `klear-megatron plan --json` prints them")
    return tuple(plans)


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for number, row in _rows(path):
        step = row.pop("step", None)
        if not isinstance(step, int):
            raise UserError(f"{path}:{number}: has no step; it is not a run's metrics.jsonl")
        for metric, value in row.items():
            steps, values = curves.setdefault(metric, ([], []))
            steps.append(step)
            values.append(value if value is None or math.isfinite(value) else None)
    return curves


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON Lines file with their line numbers; half a line that a killed run left at
    the end is left out.

    Raises:
        UserError: a line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: cannot be read: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: is not a JSON object")
            yield number, row


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that differ between runs of the same kind, with each run's value as text."""
    keys = dict.fromkeys(
        key
        for first in runs
        for key in first.settings
        if key != "run_dir"
        and any(
            other.kind == first.kind and other.settings.get(key) != first.settings[key]
            for other in runs
        )
    )
    return [
        {"key": key, "values": [_text(run.settings.get(key, "")) for run in runs]} for key in keys
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
