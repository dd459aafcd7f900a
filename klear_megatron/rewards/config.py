import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from klear_megatron.config import Section
from klear_megatron.rewards.limits import Limits


def _check_name(name: str) -> str:
    if not re.fullmatch(r"math|code|.+:\w+", name):
        raise ValueError(
            f"{name!r} names no function: write package.module:function or file.py:function, or "
            "math or code for one of the verifiers"
        )
    return name


GraderName = Annotated[str, AfterValidator(_check_name)]


class ScoreConfig(Section):
    """Scores of an answer: right, wrong, and what a broken format costs."""

    correct: float = 1.0
    """Score of a right answer."""
    wrong: float = -1.0
    """Score of a wrong answer."""
    format: Literal["penalty", "authors"] = "penalty"
    """penalty: `format_penalty` is subtracted unless the reasoning is inside exactly one
    <think>...</think> at the start. authors: as in KlearReasoner's code, a response without
    </think> scores -0.5 and one with it but without <think> scores -2, whatever the answer."""

    format_penalty: float = Field(default=0.5, ge=0)
    """What a broken format costs with `format: penalty`."""


class MathRewardConfig(ScoreConfig):
    """How a mathematical answer is graded."""

    cpu_limit_s: float = Field(default=10.0, gt=0)
    """Seconds of CPU time for verifying one answer. One that takes longer counts as wrong."""

    wall_limit_s: float = Field(default=50.0, gt=0)
    """A wider limit in seconds of wall time, since other processes may keep the host busy."""

    @property
    def limits(self) -> Limits:
        """Both limits."""
        return Limits(self.cpu_limit_s, self.wall_limit_s)


class CodeRewardConfig(ScoreConfig):
    """How a program is graded, and what it may use while it is tested."""

    mode: Literal["soft", "hard"] = "soft"
    """soft: the share of the tests that pass. hard: `correct` if all pass, otherwise `wrong`; tests
    after the first failure are not run."""

    max_tests: int | None = Field(default=None, ge=1)
    """Run this many tests of a problem at most, the same ones for every response; all by default.
    KlearReasoner's code runs 16."""

    test_seed: int = 0
    """Chooses those tests."""

    float_tolerance: float = Field(default=1e-6, ge=0)
    """Relative and absolute, where the expected number is not a whole one; 0 is LiveCodeBench's
    rule."""

    test_cpu_limit_s: float = Field(default=6.0, gt=0)
    """Seconds of CPU time for one test, of all the program's processes together."""

    test_wall_limit_s: float = Field(default=30.0, gt=0)
    """A wider limit in seconds of wall time, since other processes may keep the host busy."""

    cpu_limit_s: float = Field(default=60.0, gt=0)
    """Seconds of CPU time for all tests of a program. Tests that are left then count as failed."""

    wall_limit_s: float = Field(default=300.0, gt=0)
    """A wider limit in seconds of wall time."""

    memory_mb: int = Field(default=1024, ge=64)
    """MiB of memory for all processes of a program together."""

    processes: int = Field(default=32, ge=1)
    """Processes and threads that a program may have at the same time."""

    output_mb: int = Field(default=16, ge=1)
    """MiB that a program may write; more ends it."""
    python: Path | None = None
    """The interpreter that runs the programs. They can import what is installed for it. By default,
    the interpreter that this environment was made from."""

    sandbox: Literal["bubblewrap", "unsafe"] = "bubblewrap"
    """unsafe runs the programs without a sandbox: they may do whatever your user may."""


class CustomRewardConfig(Section):
    """A reward function of your own, such as `f(response, ground_truth)`, sync or async.

    It has any of the parameters that docs/rewards.md lists, and returns a number, a Reward, or a
    dictionary with `score`. Async functions run at the same time, in one thread.
    """

    function: GraderName
    """package.module:function, or some/file.py:function; `math` and `code` are the verifiers."""

    weight: float = 1.0
    """The reward is the sum of all scores, each times its weight."""

    data_sources: tuple[str, ...] = ()
    """The data sources it grades; by default all. One without a verifier needs such a function."""

    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds by the clock for one response; then it is ended and its score is 0."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_is_enough(cls, given: object) -> object:
        return {"function": given} if isinstance(given, str) else given


class RewardConfig(Section):
    """How responses are graded."""

    sources: dict[str, GraderName] = Field(default={})
    """data_source -> its verifier: `math`, `code`, or a function of your own. Data sources named
    `math` or `code`, or as KlearReasoner names them, have theirs without this."""

    thinking: Literal["required", "opened", "none"] = "required"
    """required: a response is `<think>`, reasoning, `</think>`, answer. opened: the chat template
    has written the `<think>`, and the response goes on after it. none: the model does not think,
    and all of its response is the answer."""

    math: MathRewardConfig = MathRewardConfig()
    code: CodeRewardConfig = CodeRewardConfig()
    custom: tuple[CustomRewardConfig, ...] = ()
    verifier_weight: float = 1.0
    """The weight of the verifier's score in the reward."""

    max_concurrent: int = Field(default=64, ge=1)
    """How many calls of async custom functions run at the same time on one host."""

    workers: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    """Processes that grade at the same time on one host; by default, as many as it has cores."""
