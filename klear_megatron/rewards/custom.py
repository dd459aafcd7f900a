"""Reward functions that the user wrote."""

import functools
import inspect
from collections.abc import Awaitable, Callable

from klear_megatron.config.imports import import_object
from klear_megatron.errors import UserError
from klear_megatron.rewards.reward import Reward, is_formatted

CustomReward = Callable[
    [str, str | list[str], str], float | Reward | Awaitable[float] | Awaitable[Reward]
]
"""`f(response, ground_truth, data_source)`. A plain score above 0 means that it is correct."""

_SETTING = "rewards.custom.function"


@functools.cache
def import_function(path: str) -> CustomReward:
    """The function that `package.module:function` or `some/file.py:function` names.

    Raises:
        UserError: there is no such function.
    """
    function: CustomReward = import_object(path, _SETTING)
    if not callable(function):
        raise UserError(f"{_SETTING}: {path!r} is not a function")
    return function


def is_async(function: CustomReward) -> bool:
    return inspect.iscoroutinefunction(function)


def as_reward(value: object, response: str, path: str) -> Reward:
    """Raises UserError if a function returned neither a number nor a Reward."""
    if isinstance(value, Reward):
        return value
    if isinstance(value, (int, float)):
        score = float(value)
        return Reward(score=score, correct=score > 0, formatted=is_formatted(response))
    raise UserError(f"{_SETTING}: {path} returned {value!r}; it has to return a number or a Reward")
