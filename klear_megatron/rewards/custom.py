"""Reward functions that the user wrote."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

from klear_megatron.config.imports import describe_failure, import_object
from klear_megatron.errors import UserError
from klear_megatron.rewards.reward import Job, Reward, is_formatted

_SETTING = "rewards.custom.function"

_OFFERED: dict[str, Callable[[Job], object]] = {
    "response": lambda job: job.response,
    "solution_str": lambda job: job.response,  # verl's name
    "ground_truth": lambda job: job.ground_truth,
    "data_source": lambda job: job.data_source,
    "extra_info": lambda job: job.extra_info,
    "prompt": lambda job: job.prompt,
    "response_length": lambda job: job.response_length,
}
"""Parameters that a function may have, and what each gets."""


@dataclass(frozen=True)
class CustomReward:
    """A function of the user's, called with the parameters that it has, by their names."""

    path: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]

    @property
    def is_async(self) -> bool:
        """Whether `call` returns an awaitable."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 - an object may have an async one
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def grade(self, job: Job) -> Reward:
        """The function's verdict.

        Raises:
            UserError: it failed, or returned no reward.
        """
        try:
            value = self.function(**self._arguments(job))
        except Exception as error:
            raise self._failure(job, error) from error
        return self._as_reward(value, job)

    async def grade_async(self, job: Job) -> Reward:
        """`grade` for an async function."""
        try:
            value = await self.function(**self._arguments(job))
        except Exception as error:
            raise self._failure(job, error) from error
        return self._as_reward(value, job)

    def _arguments(self, job: Job) -> dict[str, object]:
        return {name: _OFFERED[name](job) for name in self.parameters}

    def _failure(self, job: Job, error: Exception) -> UserError:
        what = describe_failure(self.path, error)
        return UserError(f"{_SETTING}: {self.path} failed on {job.where}: {what}")

    def _as_reward(self, value: object, job: Job) -> Reward:
        """A number, a `Reward`, or verl's dictionary as a `Reward`."""
        formatted = is_formatted(job.whole)
        if isinstance(value, SupportsFloat):  # also numpy's and torch's numbers
            score = float(value)
            reward = Reward(score, correct=score > 0, formatted=formatted)
        elif isinstance(value, Mapping) and isinstance(value.get("score"), SupportsFloat):
            score = float(value["score"])
            correct = bool(value.get("acc", score > 0))
            reward = Reward(score, correct, formatted, parts=self._parts(value))
        elif isinstance(value, Reward):
            reward = value
        else:
            raise UserError(
                f"{_SETTING}: {self.path} returned {value!r} for {job.where}; it has to return a "
                'number, a Reward, or a dictionary with "score"'
            )
        if not math.isfinite(reward.score):
            raise UserError(
                f"{_SETTING}: {self.path} returned the score {reward.score} for {job.where}; a "
                "score has to be finite"
            )
        return reward

    def _parts(self, value: Mapping[str, object]) -> dict[str, float]:
        name = self.path.rpartition(":")[2]
        numbers = {key: part for key, part in value.items() if isinstance(part, SupportsFloat)}
        return {f"{name}/{key}": float(part) for key, part in numbers.items() if key != "score"}


@functools.cache
def load_function(path: str) -> CustomReward:
    """The function that `package.module:function` or `some/file.py:function` names.

    Raises:
        UserError: there is no such function, or it has a parameter that nothing is known for.
    """
    function = import_object(path, _SETTING)
    if not callable(function):
        raise UserError(f"{_SETTING}: {path!r} is not a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:  # some functions of C
        raise UserError(f"{_SETTING}: {path}: its parameters are not known: {error}") from error
    unknown = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (parameter.name not in _OFFERED or parameter.kind is parameter.POSITIONAL_ONLY)
    ]
    names = tuple(parameter.name for parameter in parameters if parameter.name in _OFFERED)
    if unknown or not names:
        what = f"nothing can be given for {', '.join(unknown)}" if unknown else "it takes no answer"
        raise UserError(
            f"{_SETTING}: {path}: {what}; its parameters get their values by name: "
            f"{', '.join(_OFFERED)}"
        )
    return CustomReward(path, function, names)
