"""Tests whether one run is better than another or merely luckier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.evaluation.scores import Problems, Row, measure
from klear_megatron.evaluation.statistics import Comparison, compare_paired, mean_and_error
from klear_megatron.evaluation.stored import read_graded, stored_config

_NO_SHARES = {"tokens"}


@dataclass(frozen=True)
class MeasureComparison:
    """One measure: each run's mean over the problems, and the paired test between the runs."""

    name: str
    first: float
    second: float
    paired: Comparison


def compare_runs(first: Path, second: Path) -> dict[str, list[MeasureComparison]]:
    """Compares two finished evaluations by every measure of every benchmark.

    Benchmarks and measures that only one run has are left out.

    Raises:
        UserError: the runs share no benchmark, one is not finished, or their problems differ.
    """
    names = [list(stored_config(run_dir).benchmarks) for run_dir in (first, second)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise UserError(
            f"{first} and {second}: no benchmark in common: {', '.join(names[0])}; and "
            f"{', '.join(names[1])}. Evaluate both on the same, by the same name"
        )
    return {name: _compare_benchmark(first, second, name) for name in common}


def _compare_benchmark(first: Path, second: Path, name: str) -> list[MeasureComparison]:
    runs = [read_graded(run_dir, name) for run_dir in (first, second)]
    _check_same_problems(name, first, second, *runs)
    a, b = ([measure(rows) for rows in run.values()] for run in runs)
    compared = []
    for name in a[0]:
        # Majority is measured only on mathematical problems.
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x and name in y]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            means = mean_and_error(xs)[0], mean_and_error(ys)[0]
            compared.append(MeasureComparison(name, *means, compare_paired(xs, ys)))
    return compared


def format_comparison(compared: Mapping[str, Sequence[MeasureComparison]]) -> str:
    """Formats a comparison as a table with a section per benchmark; shares become percentages."""
    width = max(len(name) for name in [*compared, "formatted"]) + 3
    parts = [_format_benchmark(name, rows, width) for name, rows in compared.items()]
    return "\n\n".join(parts)


def _format_benchmark(name: str, compared: Sequence[MeasureComparison], width: int) -> str:
    lines = [f"{name:{width}}{'A':>9}{'B':>9}{'B - A':>10}{'std. error':>12}{'p':>9}"]
    for row in compared:
        values = row.first, row.second, row.paired.difference, row.paired.standard_error
        a, b, difference, error = (
            (f"{value:.1f}" for value in values)
            if row.name in _NO_SHARES
            else (f"{value:.1%}" for value in values)
        )
        sign = "" if difference.startswith("-") else "+"
        lines.append(
            f"{row.name:{width}}{a:>9}{b:>9}{sign + difference:>10}{error:>12}"
            f"{_shown_p(row.paired.p_value):>9}"
        )
    return "\n".join(lines)


def _shown_p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _check_same_problems(name: str, first: Path, second: Path, a: Problems, b: Problems) -> None:
    different = [
        index
        for index in sorted(a.keys() | b.keys())
        if index not in a or index not in b or _problem(a[index][0]) != _problem(b[index][0])
    ]
    if different:
        raise UserError(
            f"{first} and {second}: {name} is not of the same problems; {len(different)} differ, "
            f"row {different[0]} of the data for one. Evaluate both on the same data"
        )


def _problem(row: Row) -> tuple[object, object]:
    return row["prompt"], row["ground_truth"]
