"""Is what a program printed or returned what was expected?"""

import math
from decimal import Decimal, InvalidOperation
from typing import Any


def outputs_agree(printed: str, expected: str, tolerance: float) -> bool:
    """Line by line and word by word.

    White space around the text, around lines and between words does not matter; line breaks within
    the text do. Two words agree where they are the same text or the same number; numbers that are
    not both written as whole ones also within `tolerance`, relative or absolute.
    """
    lines, expected_lines = printed.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(expected_lines) and all(
        line == expected_line or _words_agree(line.split(), expected_line.split(), tolerance)
        for line, expected_line in zip(lines, expected_lines, strict=True)
    )


def values_agree(value: Any, expected: Any, tolerance: float) -> bool:
    """Of Python data: tuples are lists, as they are in JSON; floats agree within `tolerance`."""
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
    numbers = isinstance(value, (int, float)) and isinstance(expected, (int, float))
    if numbers and (isinstance(value, float) or isinstance(expected, float)):
        return value == expected or _close(value, expected, tolerance)
    return bool(value == expected)


def _words_agree(words: list[str], expected_words: list[str], tolerance: float) -> bool:
    return len(words) == len(expected_words) and all(
        word == expected or _numbers_agree(word, expected, tolerance)
        for word, expected in zip(words, expected_words, strict=True)
    )


def _numbers_agree(word: str, expected: str, tolerance: float) -> bool:
    try:
        if Decimal(word) == Decimal(expected):
            return True
        whole = word.lstrip("+-").isdigit() and expected.lstrip("+-").isdigit()
        return not whole and _close(float(word), float(expected), tolerance)
    except (InvalidOperation, ValueError):
        return False


def _close(a: float, b: float, tolerance: float) -> bool:
    try:
        return math.isfinite(a - b) and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond the range of floats
        return False
