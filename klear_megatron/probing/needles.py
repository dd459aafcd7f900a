"""Samples for the needle test. Pure: token ids in, token ids out."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from klear_megatron.errors import UserError
from klear_megatron.probing.config import NeedleConfig

Encode = Callable[[str], list[int]]
"""Text -> its token ids, without any that begin or end a text."""


@dataclass(frozen=True)
class Sample:
    """One haystack with its needle, the question, and the answer at the end."""

    tokens: list[int]
    answer_tokens: int


def make_sample(
    config: NeedleConfig,
    haystack: Sequence[int],
    encode: Encode,
    *,
    length: int,
    depth: float,
    rng: random.Random,
) -> Sample:
    """A sample of exactly `length` tokens, with a value and a part of the haystack of its own.

    Args:
        depth: of the needle in the haystack, from 0 to 1.

    Raises:
        UserError: the haystack is too short, the sample has no room for its needle, or the tokens
            of the question change when the answer follows.
    """
    value = rng.choice(config.values)
    statement = encode(config.statement.format(value=value))
    question = encode(config.question.format(value=value))
    whole = encode((config.question + config.answer).format(value=value))
    if whole[: len(question)] != question or len(whole) == len(question):
        raise UserError(
            "needle: the tokenizer joins the end of the question with the answer; end the question "
            "with a whole word, and begin the answer with a space"
        )
    room = length - len(statement) - len(whole)
    if room < 0:
        raise UserError(
            f"needle.lengths: {length} tokens have no room for the statement, the question and the "
            f"answer, which have {length - room}"
        )
    if room > len(haystack):
        raise UserError(
            f"text: has {len(haystack)} tokens, but needle.lengths asks for {length}; give a "
            "longer text, or ask for fewer tokens"
        )
    start = rng.randint(0, len(haystack) - room)
    hay = list(haystack[start : start + room])
    place = round(depth * room)
    tokens = [*hay[:place], *statement, *hay[place:], *whole]
    return Sample(tokens, len(whole) - len(question))
