import os

from pydantic import Field

from klear_megatron.config import Section


class MathRewardConfig(Section):
    """Scores of a mathematical answer: right, wrong, and what a broken format costs."""

    correct: float = 1.0
    wrong: float = -1.0
    format_penalty: float = Field(default=0.5, ge=0)
    """Subtracted where the reasoning is not inside exactly one well-formed <think>...</think>."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds the verification of one answer may take; then it is ended and counts as wrong."""


class RewardConfig(Section):
    """How responses are graded."""

    math: MathRewardConfig = MathRewardConfig()

    workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    """Processes that grade at the same time; all cores of this process by default."""
