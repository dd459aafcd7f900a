"""The estimators agree with enumerating every outcome that they average over."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from klear_megatron.evaluation.compare import MeasureComparison, format_comparison
from klear_megatron.evaluation.statistics import (
    Comparison,
    compare_paired,
    majority_correct,
    mean_and_error,
    pass_at_k,
)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased():
    # The mean over all outcomes of 6 samples, each right with probability p, is pass@k itself.
    p = 0.3
    for k in range(1, 7):
        mean = sum(
            math.comb(6, c) * p**c * (1 - p) ** (6 - c) * pass_at_k(6, c, k) for c in range(7)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize("samples", range(1, 6))
def test_majority_is_its_mean_over_all_orders_of_the_samples(samples):
    for answers in itertools.product(["right", "wrong", "other", None], repeat=samples):
        # The first of equally frequent answers wins; over all orders, each wins equally often.
        outcomes = []
        for order in itertools.permutations(answers):
            votes = Counter(answer for answer in order if answer is not None)
            outcomes.append(bool(votes) and votes.most_common(1)[0][0] == "right")
        correct = [answer == "right" for answer in answers]
        assert majority_correct(answers, correct) == pytest.approx(np.mean(outcomes), abs=1e-12)


def test_correct_samples_vote_together_however_they_are_written():
    assert majority_correct(["1/2", "0.5", "3", "4"], [True, True, False, False]) == 1
    # This holds even if math-verify extracted no answer from a sample that the verifier accepts.
    assert majority_correct([None, "3"], [True, False]) == 0.5


def test_standard_error_is_that_of_the_mean_over_resamplings():
    # Over all samples of size n drawn with replacement from a population, the variance of the mean
    # is the population's over n, and the squared error estimates it without bias.
    population = [0.0, 0.25, 1.0]
    drawn = list(itertools.product(population, repeat=4))
    means, errors = zip(*(mean_and_error(sample) for sample in drawn), strict=True)
    assert np.mean(np.square(errors)) == pytest.approx(np.var(means), abs=1e-12)
    assert mean_and_error([0.5]) == (0.5, 0.0)


def brute_force_p_value(differences: list[float]) -> float:
    sums = [
        abs(math.fsum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(differences))
    ]
    return sum(value >= abs(math.fsum(differences)) - 1e-9 for value in sums) / len(sums)


@pytest.mark.parametrize("seed", range(6))
def test_paired_comparison_is_the_enumeration_of_all_sign_flips(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 9, size=(2, 10)) / 8
    comparison = compare_paired(first, second)
    assert comparison.difference == pytest.approx(second.mean() - first.mean(), abs=1e-12)
    assert comparison.p_value == brute_force_p_value(list(second - first))
    assert compare_paired(second, first).p_value == comparison.p_value


def test_runs_that_are_equal_do_not_differ():
    comparison = compare_paired([0.5, 1.0], [0.5, 1.0])
    assert (comparison.difference, comparison.standard_error, comparison.p_value) == (0, 0, 1)


def test_random_flips_agree_with_all_of_them():
    rng = np.random.default_rng(0)
    # Eighteen is two more than the number that is enumerated.
    first, second = np.zeros(18), rng.choice([-0.25, 0.5, 0.75], size=18)
    expected = brute_force_p_value(list(second))
    assert 0.001 < expected < 0.5
    tolerance = 5 * math.sqrt(expected * (1 - expected) / 100_000)
    assert compare_paired(first, second).p_value == pytest.approx(expected, abs=tolerance)


def test_a_certain_difference_has_a_small_p_value_that_is_not_zero():
    assert compare_paired([0.0] * 40, [1.0] * 40).p_value == pytest.approx(1 / 100_001)


def test_a_p_value_of_almost_nothing_is_not_printed_as_0():
    paired = Comparison(difference=0.5, standard_error=0.01, p_value=3e-6)
    compared = {"sums": [MeasureComparison("accuracy", 0.1, 0.6, paired)]}
    assert format_comparison(compared).split()[-1] == "<0.0001"
