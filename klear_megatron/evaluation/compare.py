"""Is one run better than another, or luckier?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.evaluation.scores import measure
from klear_megatron.evaluation.statistics import Comparison, compare_paired, mean_and_error
from klear_megatron.evaluation.stored import Problems, Row, read_all

_NO_SHARES = {"tokens"}


@dataclass(frozen=True)
class MeasureComparison:
    """Of one measure: both runs' means over their problems, and the paired test between them."""

    name: str
    first: float
    second: float
    paired: Comparison


def compare_runs(first: Path, second: Path) -> list[MeasureComparison]:
    """Two finished evaluations, measure by measure; those that only one has are left out.

    Raises:
        UserError: an evaluation is not finished, or they are of different problems.
    """
    runs = [_read_graded(run_dir) for run_dir in (first, second)]
    _check_same_problems(first, second, *runs)
    a, b = ([measure(rows) for rows in run.values()] for run in runs)
    compared = []
    for name in a[0]:
        # Majority is measured of mathematical problems only.
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x and name in y]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            means = mean_and_error(xs)[0], mean_and_error(ys)[0]
            compared.append(MeasureComparison(name, *means, compare_paired(xs, ys)))
    return compared


def format_comparison(compared: Sequence[MeasureComparison]) -> str:
    """A table to read; shares are percentages."""
    lines = [f"{'':12}{'A':>9}{'B':>9}{'B - A':>10}{'std. error':>12}{'p':>9}"]
    for row in compared:
        values = row.first, row.second, row.paired.difference, row.paired.standard_error
        a, b, difference, error = (
            (f"{value:.1f}" for value in values)
            if row.name in _NO_SHARES
            else (f"{value:.1%}" for value in values)
        )
        sign = "" if difference.startswith("-") else "+"
        lines.append(
            f"{row.name:12}{a:>9}{b:>9}{sign + difference:>10}{error:>12}{row.paired.p_value:>9.4f}"
        )
    return "\n".join(lines)


def _read_graded(run_dir: Path) -> Problems:
    problems = read_all(run_dir)
    if any(row["reward"] is None for rows in problems.values() for row in rows):
        raise UserError(f"{run_dir}: its responses are not graded; `klear-megatron regrade` it")
    return problems


def _check_same_problems(first: Path, second: Path, a: Problems, b: Problems) -> None:
    different = [
        index
        for index in sorted(a.keys() | b.keys())
        if index not in a or index not in b or _problem(a[index][0]) != _problem(b[index][0])
    ]
    if different:
        raise UserError(
            f"{first} and {second}: not evaluations of the same problems; {len(different)} differ, "
            f"row {different[0]} of the data for one. Evaluate both on the same data"
        )


def _problem(row: Row) -> tuple[object, object]:
    return row["prompt"], row["ground_truth"]
