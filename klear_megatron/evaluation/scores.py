"""Computes an evaluation's results from graded responses."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from klear_megatron.evaluation.statistics import majority_correct, mean_and_error, pass_at_k
from klear_megatron.observability import Metric

Row = dict[str, Any]
"""One response, as `response_row` makes it. A graded mathematical response also has `answer`."""
Problems = dict[int, list[Row]]
"""The rows of each problem's samples, by its index, in the order of the indices."""

METRICS = (
    Metric("avg", "share", "avg@n: right samples of a problem, mean over problems", "falls"),
    Metric("standard_error", "share", "of `avg`, from the spread over problems"),
    Metric(
        "pass_at_K",
        "share",
        "estimate of the problems that one of K samples solves; for the largest power of two up to "
        "the samples per problem",
    ),
    Metric("majority", "share", "mathematical problems that a majority vote of the samples solves"),
    Metric("formatted", "share", "samples whose reasoning is in one well-formed think block"),
    Metric("truncated", "share", "samples that reached the length limit", "above 0.1"),
    Metric("length_mean", "tokens", "mean over the samples"),
)


@dataclass(frozen=True)
class Scores:
    """Results over all problems, with n samples each; shares lie between 0 and 1."""

    accuracy: float
    """avg@n: the mean over problems of the share of correct samples."""
    standard_error: float
    """Standard error of `accuracy`, from the spread over problems; 0 with a single problem."""
    pass_at_k: dict[int, float]
    """k -> the unbiased estimate of pass@k, for the powers of two up to n."""
    majority: float | None
    """maj@n over the mathematical problems; None if there are none."""
    formatted: float
    """Share of samples whose reasoning is in one well-formed think block."""
    truncated: float
    """Share of samples that hit the length limit."""
    length_mean: float
    """Tokens per response."""
    problems: int
    samples_per_problem: int

    def metrics(self) -> dict[str, float]:
        """The scores under short names, for charts; pass@k only for the largest k."""
        k, share = list(self.pass_at_k.items())[-1]
        metrics = {
            "avg": self.accuracy,
            "standard_error": self.standard_error,
            f"pass_at_{k}": share,
            "formatted": self.formatted,
            "truncated": self.truncated,
            "length_mean": self.length_mean,
        }
        return metrics if self.majority is None else metrics | {"majority": self.majority}

    def __str__(self) -> str:
        n = self.samples_per_problem
        more = [f"pass@{k} {share:.1%}" for k, share in self.pass_at_k.items() if k > 1]
        if self.majority is not None and n > 1:
            more.append(f"maj@{n} {self.majority:.1%}")
        return (
            f"avg@{n} over {self.problems} problems: "
            f"{self.accuracy:.1%} ± {self.standard_error:.1%} (standard error); "
            + "".join(f"{part}, " for part in more)
            + f"well-formed {self.formatted:.1%}, truncated {self.truncated:.1%}, "
            f"{self.length_mean:.0f} tokens a response"
        )


def by_problem(rows: Iterable[Row]) -> Problems:
    """Groups rows by problem, keeping the order of each problem's samples."""
    problems: Problems = {}
    for row in rows:
        problems.setdefault(row["index"], []).append(row)
    return dict(sorted(problems.items()))


def score(problems: Problems) -> Scores:
    """Scores graded rows, of which each problem must have the same number."""
    measured = [measure(rows) for rows in problems.values()]
    n = len(next(iter(problems.values())))

    def mean(name: str) -> float:
        return statistics.fmean(values[name] for values in measured)

    accuracy, standard_error = mean_and_error([values["accuracy"] for values in measured])
    votes = [values["majority"] for values in measured if "majority" in values]
    return Scores(
        accuracy=accuracy,
        standard_error=standard_error,
        pass_at_k={k: mean(f"pass@{k}") for k in _powers_of_two(n)},
        majority=statistics.fmean(votes) if votes else None,
        formatted=mean("formatted"),
        truncated=mean("truncated"),
        length_mean=mean("tokens"),
        problems=len(problems),
        samples_per_problem=n,
    )


def measure(rows: Sequence[Row]) -> dict[str, float]:
    """The measures of one problem, by name, from the graded rows of its n samples."""
    correct = [row["reward"]["correct"] for row in rows]
    n = len(rows)
    measured = {
        "accuracy": statistics.fmean(correct),
        **{f"pass@{k}": pass_at_k(n, sum(correct), k) for k in _powers_of_two(n)},
        "formatted": statistics.fmean(row["reward"]["formatted"] for row in rows),
        "truncated": statistics.fmean(row["finish_reason"] == "length" for row in rows),
        "tokens": statistics.fmean(row["tokens"] for row in rows),
    }
    if "answer" in rows[0]:
        measured["majority"] = majority_correct([row["answer"] for row in rows], correct)
    return measured


def _powers_of_two(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length())]
