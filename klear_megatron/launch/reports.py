"""How the tasks of a job report their end: each in a file of its own, `ended/ROLE-RANK.json`.

`role` writes the reports; `conductor` and `status` read them. Needs only the standard library of
Python 3.9.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from klear_megatron.platform.exit_codes import CONTINUE, FINISHED
from klear_megatron.platform.files import write_atomically


@dataclass(frozen=True)
class Report:
    """A task that has ended."""

    role: str
    rank: int
    node: str
    code: int
    time: float
    error: str
    explicit: bool
    """Whether the error is a message of ours, and not the last line of a crash."""

    @property
    def failed(self) -> bool:
        """Whether the task neither finished nor was told to end."""
        return self.code not in (FINISHED, CONTINUE)

    def __str__(self) -> str:
        where = f"{self.role} on {self.node}, rank {self.rank}"
        return f"{where}, ended with code {self.code}: {self.error}"


def write_report(report: Report, folder: Path) -> None:
    """Writes a report into the folder of an attempt."""
    write_json(folder / "ended" / f"{report.role}-{report.rank}.json", asdict(report))


def read_reports(folder: Path, role: str = "*") -> list[Report]:
    """The reports in the folder of an attempt, of all roles or of one."""
    files = sorted((folder / "ended").glob(f"{role}-*.json"))
    return [Report(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def first_failure(reports: Iterable[Report]) -> Report | None:
    """The failure that explains the others: a message of ours first, then the earliest."""
    failed = [report for report in reports if report.failed]
    return min(failed, key=lambda report: (not report.explicit, report.time), default=None)


def write_json(path: Path, value: object) -> None:
    """Writes a file of which a reader sees all or nothing."""
    with write_atomically(path) as file:
        json.dump(value, file)
