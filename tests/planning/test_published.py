"""Planned speeds beside published ones."""

import pytest

from klear_megatron.planning import Efficiency
from klear_megatron.planning import published as p

FITTED = [row for row in p.rows("dense", "moe", "other") if "fitted" in row]
PREDICTED = [row for row in p.rows("dense") if "fitted" not in row]


def test_dense_rows_that_set_no_constant_are_predicted():
    compared = [p.compare(row) for row in PREDICTED]
    assert p.median_error(compared) < 0.10
    assert max(abs(of_one.error) for of_one in compared) < 0.30


def test_dense_rows_are_predicted_without_themselves():
    compared = [p.left_out(row) for row in p.rows("dense")]
    assert p.median_error(compared) < 0.10
    assert max(abs(of_one.error) for of_one in compared) < 0.30


@pytest.mark.parametrize("row", p.rows("moe", "other"), ids=lambda row: row["id"])
def test_experts_and_other_frameworks_are_within_a_fifth(row):
    assert abs(p.compare(row).error) < 0.20


def test_the_constants_are_those_that_the_named_rows_set():
    start = Efficiency(matrix=0.9, matrix_fp8=0.9, attention=0.9, expert=0.9)
    fitted = p.fit(start, {row["fitted"]: row for row in FITTED})
    for name, value in Efficiency():
        if name != "bandwidth":
            assert getattr(fitted, name) == pytest.approx(value, rel=0.01), name
