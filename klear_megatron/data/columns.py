"""Which columns of a row hold what."""

import re
from collections.abc import Mapping
from typing import Any

from klear_megatron.data.files import Row
from klear_megatron.data.messages import Message, read_messages
from klear_megatron.errors import UserError

_MISSING = object()
_PLACE = re.compile(r"(?<![\w}\\])\{([A-Za-z_][\w.]*)\}")
"""A column's name in braces; those of LaTeX, as in \\boxed{answer}, stand right after a letter."""


def column(row: Row, key: str, setting: str) -> Any:
    """The value of a column, or of a path with dots.

    Args:
        setting: names the column in the config, for the message.

    Raises:
        UserError: the row does not have it; the message begins with the key.
    """
    value = _look_up(row, key)
    if value is _MISSING or value is None:
        raise UserError(
            f"{key}: Field required; the row has {', '.join(row)}; if another of these is meant, "
            f"set {setting}"
        )
    return value


def optional_column(row: Row, key: str) -> Any:
    """The value of a column, or of a path with dots; None where there is none."""
    value = _look_up(row, key)
    return None if value is _MISSING else value


def _look_up(row: Row, key: str) -> Any:
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def prompt_messages(row: Row, key: str, template: str | None) -> list[Message]:
    """The messages to answer: those of a column, or one of the user's from a template.

    Raises:
        UserError: a column is missing, or malformed; the message begins with its name.
    """
    if template is None:
        return read_messages(column(row, key, "prompt_key"), key)

    def fill(place: re.Match[str]) -> str:
        return str(column(row, place[1], "prompt_template"))

    return read_messages(_PLACE.sub(fill, template).strip(), "prompt_template")


def ground_truth(row: Row, key: str, pattern: str | None) -> str | list[str]:
    """The answers that are right, as text.

    Raises:
        UserError: there is none, or `pattern` does not find it; the message begins with the key.
    """
    value = column(row, key, "ground_truth_key")
    answers = [_as_text(answer) for answer in (value if isinstance(value, list) else [value])]
    if not answers or not all(answers):
        raise UserError(
            f"{key}: Input should be a text, a number or a list of them, none of them empty"
        )
    found = [_found(answer, pattern, key) for answer in answers if answer]
    return found if isinstance(value, list) else found[0]


def _as_text(answer: Any) -> str | None:
    if isinstance(answer, str):
        return answer
    number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return str(answer) if number else None


def _found(answer: str, pattern: str | None, key: str) -> str:
    if pattern is None:
        return answer
    match = re.search(pattern, answer)
    if match is None:
        raise UserError(
            f"{key}: ground_truth_pattern {pattern!r} is not found in {answer[-200:]!r}"
        )
    return (match[1] if match.re.groups else match[0]).strip()
