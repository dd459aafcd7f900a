"""What a grade is, and the format that every response is held to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from klear_megatron.rewards.config import ScoreConfig

AUTHORS_SCORE_WITHOUT_END, AUTHORS_SCORE_WITHOUT_START = -0.5, -2.0
"""What KlearReasoner gives a response without `</think>`, and one with it but without `<think>`."""


@dataclass(frozen=True)
class Reward:
    """The grade of one response.

    `score` is what training maximises. `correct` says whether the answer is right whatever the
    format, `formatted` whether the reasoning is in one well-formed think block whatever the answer.
    A response whose verification did not end in time is `timed_out`, and not correct. `parts` is
    what the score was made of, for the logs: numbers by name, whose mean over responses is of use.
    """

    score: float
    correct: bool
    formatted: bool
    timed_out: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)


def is_formatted(response: str) -> bool:
    """Whether the response is reasoning in one <think>...</think> at its start, then an answer."""
    return (
        response.lstrip().startswith("<think>")
        and response.count("<think>") == 1
        and response.count("</think>") == 1
    )


def score_with_format(score: float, response: str, config: ScoreConfig) -> float:
    """What `score` becomes for a response whose format may be broken."""
    if config.format == "penalty":
        return score if is_formatted(response) else score - config.format_penalty
    if "</think>" not in response:
        return AUTHORS_SCORE_WITHOUT_END
    return score if "<think>" in response else AUTHORS_SCORE_WITHOUT_START


def answer_of(response: str) -> str:
    """What follows the last `</think>`; nothing without one, however right the reasoning."""
    _, end_of_thinking, answer = response.rpartition("</think>")
    return answer if end_of_thinking else ""
