"""What grades a response: the verifier of its data source, and the user's own functions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from klear_megatron.errors import UserError
from klear_megatron.rewards.answers import agrees
from klear_megatron.rewards.code import code_reward, score_program
from klear_megatron.rewards.code_tests import parse_tests
from klear_megatron.rewards.config import (
    CodeRewardConfig,
    CustomRewardConfig,
    MathRewardConfig,
    RewardConfig,
)
from klear_megatron.rewards.custom import load_function
from klear_megatron.rewards.limits import Limits
from klear_megatron.rewards.math import score_answer
from klear_megatron.rewards.reward import GroundTruth, Job, Reward, answer_of, is_formatted
from klear_megatron.rewards.sandbox import check_sandbox


class Grader(Protocol):
    """Grades responses in another process, so it can be pickled."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def limits(self) -> Limits:
        """Limits of time for grading one response; a process that reaches one is ended."""

    def grade(self, job: Job) -> Reward: ...

    def failed(self, response: str, *, timed_out: bool) -> Reward:
        """The reward if `grade` did not return: it reached a limit, or its process ended."""

    def check(self) -> None:
        """Raises UserError if it cannot grade on this host."""


@dataclass(frozen=True)
class MathGrader:
    config: MathRewardConfig
    weight: float
    name: str = "math"

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def grade(self, job: Job) -> Reward:
        correct = agrees(answer_of(job.whole), job.ground_truth)
        return score_answer(job.whole, self.config, correct=correct)

    def failed(self, response: str, *, timed_out: bool) -> Reward:
        return score_answer(response, self.config, correct=False, timed_out=timed_out)

    def check(self) -> None:
        pass


@dataclass(frozen=True)
class CodeGrader:
    config: CodeRewardConfig
    weight: float
    name: str = "code"

    @property
    def limits(self) -> Limits:
        # The sandbox keeps to limits of its own. These are for comparing what it has printed.
        return Limits(self.config.cpu_limit_s, self.config.wall_limit_s + 10)

    def grade(self, job: Job) -> Reward:
        return code_reward(job.whole, job.ground_truth, self.config)

    def failed(self, response: str, *, timed_out: bool) -> Reward:
        return score_program(response, self.config, 1, Counter(["time" if timed_out else "ended"]))

    def check(self) -> None:
        check_sandbox(self.config)


@dataclass(frozen=True)
class CustomGrader:
    config: CustomRewardConfig

    @property
    def name(self) -> str:
        return self.config.function.rpartition(":")[2]

    @property
    def weight(self) -> float:
        return self.config.weight

    @property
    def limits(self) -> Limits:
        return Limits(None, self.config.timeout_s)

    @property
    def is_async(self) -> bool:
        return load_function(self.config.function).is_async

    def grade(self, job: Job) -> Reward:
        return load_function(self.config.function).grade(job)

    async def grade_async(self, job: Job) -> Reward:
        return await load_function(self.config.function).grade_async(job)

    def failed(self, response: str, *, timed_out: bool) -> Reward:
        formatted = is_formatted(response)
        return Reward(0.0, correct=False, formatted=formatted, timed_out=timed_out)

    def check(self) -> None:
        load_function(self.config.function)


_VERIFIERS = {"math_longcot_math_verify": "math", "coder1_longcot": "code"}


def verifier_of(data_source: str, sources: Mapping[str, str] = {}) -> str | None:
    """ "math", "code", what `RewardConfig.sources` says, or None."""
    if data_source in sources:
        return sources[data_source]
    if data_source in _VERIFIERS.values():
        return data_source
    # Benchmarks are named after the verifier: math_longcot_math_verify_aime2024.
    for name, kind in _VERIFIERS.items():
        if data_source == name or data_source.startswith(f"{name}_"):
            return kind
    return None


def graders_of(data_source: str, config: RewardConfig) -> list[Grader]:
    """The verifier of the data source, if it has one, then the custom functions that grade it.

    Raises:
        UserError: nothing grades this data source.
    """
    named = [
        custom
        for custom in config.custom
        if not custom.data_sources or data_source in custom.data_sources
    ]
    if (verifier := verifier_of(data_source, config.sources)) is not None:
        named.insert(0, CustomRewardConfig(function=verifier, weight=config.verifier_weight))
    if not named:
        raise UserError(
            f"data_source {data_source!r}: no verifier is known for it; known ones: code, math, "
            f"{', '.join(sorted(_VERIFIERS))}; give it one of them or a function of your own in "
            "rewards.sources, or name one for all sources under rewards.custom"
        )
    return [_grader(one, config) for one in named]


def _grader(named: CustomRewardConfig, config: RewardConfig) -> Grader:
    match named.function:
        case "math":
            return MathGrader(config.math, named.weight)
        case "code":
            return CodeGrader(config.code, named.weight)
        case _:
            return CustomGrader(named)


def check_data_sources(data_sources: Iterable[str], config: RewardConfig = RewardConfig()) -> None:
    """Raises UserError if one of them has no grader, or none that runs on this host."""
    for data_source in set(data_sources):
        for grader in graders_of(data_source, config):
            grader.check()


def check_functions(config: RewardConfig) -> None:
    """Raises UserError if what the config names cannot grade, whatever the data are."""
    verifiers = [CustomRewardConfig(function=name) for name in config.sources.values()]
    for named in (*verifiers, *config.custom):
        _grader(named, config).check()


def check_ground_truths(
    pairs: Iterable[tuple[str, GroundTruth]], config: RewardConfig = RewardConfig()
) -> None:
    """Raises UserError if the tests of programming problems cannot be used, and says how many.

    Args:
        pairs: data_source and ground truth of each row; all tests are parsed.
    """
    bad: list[str] = []
    for i, (data_source, ground_truth) in enumerate(pairs):
        if verifier_of(data_source, config.sources) == "code":
            try:
                parse_tests(ground_truth)
            except UserError as error:
                bad.append(f"row {i}: {error}")
    if bad:
        more = [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
        raise UserError("\n".join([f"rows that cannot be graded: {len(bad)}", *bad[:5], *more]))


def combine(graders: Sequence[Grader], rewards: Sequence[Reward]) -> Reward:
    """One reward out of those of several graders: the weighted sum of their scores.

    The first grader, which is the verifier if there is one, decides whether it is correct and
    formatted. The single scores are among the parts.
    """
    first = rewards[0]
    if len(rewards) == 1 and graders[0].weight == 1:
        return first
    parts = {name: value for reward in rewards for name, value in reward.parts.items()}
    parts |= {grader.name: reward.score for grader, reward in zip(graders, rewards, strict=True)}
    pairs = zip(graders, rewards, strict=True)
    return Reward(
        score=sum(grader.weight * reward.score for grader, reward in pairs),
        correct=first.correct,
        formatted=first.formatted,
        timed_out=any(reward.timed_out for reward in rewards),
        parts=parts,
    )
