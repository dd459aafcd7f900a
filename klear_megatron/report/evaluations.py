"""The scores of evaluations, and what changed from one to another problem by problem."""

import itertools
from collections.abc import Sequence
from typing import Any

from klear_megatron.errors import UserError
from klear_megatron.evaluation.scores import Problems, measure, score
from klear_megatron.evaluation.statistics import compare_paired
from klear_megatron.evaluation.stored import read_all, stored_config
from klear_megatron.report.runs import Run

_CHANGED = 50
"""As many problems are shown of those that changed."""


def read_evaluations(runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """What the page shows about the evaluations among the runs.

    Returns:
        scores and comparisons, and a note on each benchmark that is not finished.
    """
    scores, notes = [], []
    finished: dict[str, list[tuple[int, Problems]]] = {}
    for number, run in enumerate(runs):
        if run.kind != "evaluation":
            continue
        for benchmark in stored_config(run.folder).benchmarks:
            try:
                problems = read_all(run.folder, benchmark)
            except UserError as error:
                notes.append(str(error))
                continue
            if any(row["reward"] is None for rows in problems.values() for row in rows):
                notes.append(f"{run.folder}: {benchmark} is not graded; `klear-megatron regrade`")
                continue
            of_one = score(problems)
            scores.append(
                {
                    "run": number,
                    "benchmark": benchmark,
                    **vars(of_one),
                    "pass_at_k": list(of_one.pass_at_k.items()),
                }
            )
            finished.setdefault(benchmark, []).append((number, problems))
    comparisons = [
        compared
        for benchmark, evaluated in finished.items()
        for (a, first), (b, second) in itertools.combinations(evaluated, 2)
        if (compared := _compare(benchmark, a, first, b, second)) is not None
    ]
    # The latest pair first: it is the one that people come for.
    return {"scores": scores, "comparisons": comparisons[::-1]}, notes


def _compare(
    benchmark: str, a: int, first: Problems, b: int, second: Problems
) -> dict[str, Any] | None:
    """None if the two were asked different problems."""
    if {i: _asked(rows) for i, rows in first.items()} != {
        i: _asked(rows) for i, rows in second.items()
    }:
        return None
    before, after = (
        [measure(rows)["accuracy"] for rows in problems.values()] for problems in (first, second)
    )
    paired = compare_paired(before, after)
    problems: list[dict[str, Any]] = [
        {"text": _text(first[index][0]), "a": x, "b": y}
        for index, x, y in zip(first, before, after, strict=True)
        if x != y
    ]
    problems.sort(key=lambda problem: -abs(problem["b"] - problem["a"]))
    return {
        "benchmark": benchmark,
        "a": a,
        "b": b,
        "difference": paired.difference,
        "standard_error": paired.standard_error,
        "p_value": paired.p_value,
        "better": sum(problem["b"] > problem["a"] for problem in problems),
        "worse": sum(problem["b"] < problem["a"] for problem in problems),
        "unchanged": len(first) - len(problems),
        "problems": problems[:_CHANGED],
    }


def _asked(rows: Sequence[dict[str, Any]]) -> tuple[object, object]:
    return rows[0]["prompt"], rows[0]["ground_truth"]


def _text(row: dict[str, Any]) -> str:
    text = str(row["prompt"][-1]["content"])
    return text if len(text) <= 300 else text[:300] + "…"
