"""The grade of a response, and the format that every response should have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from klear_megatron.rewards.config import ScoreConfig

AUTHORS_SCORE_WITHOUT_END, AUTHORS_SCORE_WITHOUT_START = -0.5, -2.0
"""What KlearReasoner gives a response without `</think>`, and one with it but without `<think>`."""


GroundTruth = str | list[str]


@dataclass(frozen=True)
class Job:
    """A response to grade, and what is known about its prompt."""

    data_source: str
    response: str
    ground_truth: GroundTruth
    prompt: Sequence[Mapping[str, Any]] = ()
    """The messages."""
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    """The row's own `extra_info`."""
    response_length: int | None = None
    """Tokens of the response."""
    index: int | None = None
    """The number of the prompt's row in the data, from 0."""

    thinking: Literal["required", "opened", "none"] = "required"
    """As in `RewardConfig`; the pool sets it."""

    @property
    def whole(self) -> str:
        """The response with the block of reasoning that every response is expected to have."""
        return with_block(self.response, self.thinking)

    @property
    def where(self) -> str:
        """The row, for messages."""
        row = "a response" if self.index is None else f"a response to row {self.index} of the data"
        return f"{row} (data_source {self.data_source!r})"


@dataclass(frozen=True)
class Reward:
    """The grade of one response.

    `score` is what training maximises. `correct`: the answer is right, whatever the format.
    `formatted`: the reasoning is in one well-formed think block, whatever the answer. `timed_out`:
    the verification reached a time limit; the response is then not correct. `parts` holds numbers
    by name that the score was made of; their means over responses are logged.
    """

    score: float
    correct: bool
    formatted: bool
    timed_out: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)


def with_block(response: str, thinking: str) -> str:
    """The response with what `RewardConfig.thinking` says stands before it, or is not asked for."""
    return {"required": "", "opened": "<think>", "none": "<think></think>"}[thinking] + response


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
    """What follows the last `</think>`; empty without one, however right the reasoning is."""
    _, end_of_thinking, answer = response.rpartition("</think>")
    return answer if end_of_thinking else ""
