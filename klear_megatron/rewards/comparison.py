"""Did a program print or return what was expected?"""

import math
from decimal import Decimal, InvalidOperation
from typing import Any


def outputs_agree(printed: str, expected: str, tolerance: float) -> bool:
    """Compare line by line; white space around the text and around lines does not matter.

    With a tolerance of 0 this is LiveCodeBench's rule: two lines agree if they are the same text,
    or consist of the same decimal numbers. With a tolerance, lines are compared word by word: two
    words agree if they are the same text or the same number. If the expected word is not written
    as a whole number, a number within `tolerance` of it, relative or absolute, agrees as well.
    """
    lines, expected_lines = printed.strip().split("\n"), expected.strip().split("\n")
    agree = _words_agree if tolerance else _decimals_agree
    return len(lines) == len(expected_lines) and all(
        line.strip() == expected_line.strip()
        or agree(line.split(), expected_line.split(), tolerance)
        for line, expected_line in zip(lines, expected_lines, strict=True)
    )


def values_agree(value: Any, expected: Any, tolerance: float) -> bool:
    """Compare Python data with what JSON has for it.

    With a tolerance of 0 this is LiveCodeBench's rule: the two are equal, and a tuple counts as a
    list, but not one inside it. With a tolerance, tuples are lists and keys of dicts are text
    everywhere, and a number within `tolerance` of an expected float agrees.
    """
    if not tolerance:
        return bool((list(value) if isinstance(value, tuple) else value) == expected)
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(
            values_agree(*pair, tolerance) for pair in zip(value, expected, strict=True)
        )
    if isinstance(value, dict) and isinstance(expected, dict):
        # The keys of JSON are text, those of a program may be numbers.
        value, expected = ({str(key): x for key, x in d.items()} for d in (value, expected))
        return value.keys() == expected.keys() and all(
            values_agree(value[key], expected[key], tolerance) for key in expected
        )
    if isinstance(value, (int, float)) and isinstance(expected, float):
        return value == expected or _close(value, expected, tolerance)
    return bool(value == expected)


def _decimals_agree(words: list[str], expected_words: list[str], tolerance: float) -> bool:
    try:
        return [*map(Decimal, words)] == [*map(Decimal, expected_words)]
    except InvalidOperation:
        return False


def _words_agree(words: list[str], expected_words: list[str], tolerance: float) -> bool:
    return len(words) == len(expected_words) and all(
        word == expected or _numbers_agree(word, expected, tolerance)
        for word, expected in zip(words, expected_words, strict=True)
    )


def _numbers_agree(word: str, expected: str, tolerance: float) -> bool:
    try:
        if Decimal(word) == Decimal(expected):
            return True
        whole = expected.lstrip("+-").isdigit()
        return not whole and _close(float(word), float(expected), tolerance)
    except (InvalidOperation, ValueError):
        return False


def _close(a: float, b: float, tolerance: float) -> bool:
    try:
        return math.isfinite(a - b) and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond the range of floats
        return False
