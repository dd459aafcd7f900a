"""Statistics of right and wrong samples, for one model and for comparing two."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EXACT_UP_TO = 16
"""Problems that differ, whose sign flips are all enumerated: 65536 of them."""
_FLIPS = 100_000
_FLIPS_AT_A_TIME = 1_000


def mean_and_error(shares: Sequence[float]) -> tuple[float, float]:
    """The mean over problems, and its standard error from their spread.

    Args:
        shares: [problems], each problem's share of correct samples, so that the mean is avg@n.

    Returns:
        The mean and the error, both between 0 and 1; the error is 0 with a single problem.
    """
    values = np.asarray(shares, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of a problem's samples, drawn without replacement, include a correct one.

    It is the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1):
    1 - C(samples - correct, k) / C(samples, k), for 1 <= k <= samples.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_correct(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """The probability that the answer most samples of a problem agree on is right: maj@n.

    Correct samples agree with the ground truth and so with each other, however their answers are
    written; the others agree where their answers are equal. A wrong sample without an answer (None)
    has no vote. A tie is broken at random, with equal chances for the tied answers.

    Args:
        answers: [n], the samples' answers.
        correct: [n], the verifier's verdict on each.
    """
    wrong = Counter(
        answer
        for answer, right in zip(answers, correct, strict=True)
        if not right and answer is not None
    )
    votes = sum(correct)
    if votes == 0 or votes < max(wrong.values(), default=0):
        return 0.0
    return 1.0 / (1 + list(wrong.values()).count(votes))


@dataclass(frozen=True)
class Comparison:
    """A paired test between two runs over the same problems."""

    difference: float
    """The second run's mean minus the first's."""
    standard_error: float
    """Standard error of the difference, from the spread of the problems' differences."""
    p_value: float
    """Two-sided: how often two equal runs would differ as much by chance."""


def compare_paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Sign-flip permutation test on the differences between two runs, problem by problem.

    If the runs were equally good, each problem's difference would be as likely with the other
    sign. With at most 16 differing problems, all combinations of signs are tried; with more,
    100,000 random ones. The observed one counts among those, so that the p-value is never 0.

    Args:
        first, second: [problems], each problem's share of correct samples, in the same order.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    mean, error = mean_and_error(differences.tolist())
    # A difference of 0 has no sign, so leaving it out does not change the sums.
    nonzero = differences[differences != 0]
    # Rounding makes sums differ that are mathematically equal.
    least = abs(nonzero.sum()) - 1e-9
    if len(nonzero) <= _EXACT_UP_TO:
        combinations = np.arange(2 ** len(nonzero))
        negative = (combinations[:, None] >> np.arange(len(nonzero))) & 1
        return Comparison(mean, error, float(np.mean(_flipped(nonzero, negative) >= least)))
    rng = np.random.default_rng(seed)
    as_large = sum(
        np.count_nonzero(
            _flipped(nonzero, rng.integers(2, size=(_FLIPS_AT_A_TIME, len(nonzero)))) >= least
        )
        for _ in range(_FLIPS // _FLIPS_AT_A_TIME)
    )
    return Comparison(mean, error, float((as_large + 1) / (_FLIPS + 1)))


def _flipped(differences: NDArray[np.float64], negative: NDArray[np.int64]) -> NDArray[np.float64]:
    """[flips]: |sum of signs * differences| for signs [flips, problems], differences [problems]."""
    return np.abs((1 - 2 * negative) @ differences)
