"""When a printed output or a returned value agrees with the expected one."""

import pytest

from klear_megatron.rewards.comparison import outputs_agree, values_agree


@pytest.mark.parametrize(
    ("printed", "expected", "agree"),
    [
        ("5", "5\n", True),
        ("5 \n", "5", True),
        ("\n\n 1  2\t3 \r\n4\n", "1 2 3\n4", True),
        ("1 2 3", "1\n2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("", "0", False),
        ("YES", "Yes", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.3333", False),
        ("1e-7", "0.0", True),
        ("1e-7", "0", False),
        ("2.0", "2", True),
        ("2.0000001", "2", False),
        ("123456800.0", "123456789", False),
        ("1.23456789e8", "123456789", True),
        ("123456788.9", "123456789.0", True),
        ("YES  NO", "YES NO", True),
        ("5", "5.0000000001", True),
        ("007", "7", True),
        ("1000000007", "1000000008", False),
        ("1" + "0" * 400, "1" + "0" * 399 + "1", False),
        ("1" + "0" * 400 + ".5", "1" + "0" * 400, False),
        ("nan", "nan", True),
        ("nan", "1.5", False),
        ("inf", "1e999", False),
        ("-0", "0", True),
        ("a 0.1", "b 0.1", False),
        ("[1, 2]", "[1,2]", False),
    ],
)
def test_outputs_are_compared_by_lines_words_and_numbers(printed, expected, agree):
    assert outputs_agree(printed, expected, 1e-6) is agree


@pytest.mark.parametrize(
    ("printed", "expected", "agree"),
    [
        ("2.50", "2.5", True),
        ("0.3333333", "0.33333333333", False),
        ("2.0 3", "2 3.0", True),
        (" 1  2 \n3", "1 2\n3 ", True),
        ("YES  NO", "YES NO", False),
        ("x 2.0", "x 2", False),
        ("x 2", "x 2", True),
        ("nan 1", "nan 1.0", False),
        ("snan 1", "snan 1.0", False),
        ("Infinity", "inf", True),
        ("1_000", "1000", True),
        ("1\n\n2", "1\n2", False),
        ("", "0", False),
    ],
)
def test_without_tolerance_lines_are_the_same_text_or_the_same_decimals(printed, expected, agree):
    assert outputs_agree(printed, expected, 0) is agree


@pytest.mark.parametrize(
    ("value", "expected", "agree"),
    [
        ((1, 2), [1, 2], True),
        ([(1, 2)], [[1, 2]], False),
        (0.1 + 0.2, 0.3, False),
        (2.0, 2, True),
        (True, 1, True),
        ({1: 2}, {"1": 2}, False),
    ],
)
def test_without_tolerance_values_have_to_be_equal(value, expected, agree):
    assert values_agree(value, expected, 0) is agree


@pytest.mark.parametrize(
    ("value", "expected", "agree"),
    [
        ((1, (2, 3)), [1, [2, 3]], True),
        ([1, 2], [2, 1], False),
        ([0.1 + 0.2], [0.3], True),
        (10**9 + 7, 10**9 + 8, False),
        (10**400, 0.5, False),
        (123456800.0, 123456789, False),
        (2.0000001, 2.0, True),
        (2.0000001, 2, False),
        (2.0, 2, True),
        ("5", 5, False),
        ({1: 2.0}, {"1": 2}, True),
        ({1: 2}, {"1": 2, "3": 4}, False),
        (True, True, True),
        (None, False, False),
        ([], None, False),
        (float("nan"), 1.0, False),
    ],
)
def test_returned_values_are_compared_as_data(value, expected, agree):
    assert values_agree(value, expected, 1e-6) is agree
