"""What a check finds, and how findings are kept and shown."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "not here", "no time"]


Numbers = dict[str, Any]


class FailedError(Exception):
    """The check has found a defect. Carries the numbers that show it."""

    def __init__(self, reason: str, numbers: Numbers) -> None:
        super().__init__(reason)
        self.numbers = numbers


class NotHereError(Exception):
    """The check does not apply to this machine; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of one check."""

    status: Status
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What it has measured."""
    reason: str = ""
    """Why it has not passed."""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The numbers and the reason in one line."""
        numbers = [f"{name} {_short(value)}" for name, value in self.numbers.items()]
        return "; ".join([*numbers, *([self.reason] if self.reason else [])])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(folder: Path, machine: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> None:
    """Writes `report.json` and `report.md`.

    Args:
        machine: versions and hardware.
        outcomes: by the names of the checks.
    """
    report = {
        "machine": dict(machine),
        "checks": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        "| check | result | numbers | seconds |",
        "|---|---|---|---|",
        *(
            f"| {name} | {outcome.status} | {outcome.text.replace('|', '/')} | "
            f"{outcome.seconds:.0f} |"
            for name, outcome in outcomes.items()
        ),
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def read_report(folder: Path, machine: Mapping[str, str]) -> dict[str, Outcome]:
    """What an earlier run on the same machine has found; nothing after an update."""
    file = folder / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    if report.get("machine") != dict(machine):
        return {}
    return {name: Outcome(**outcome) for name, outcome in report["checks"].items()}
