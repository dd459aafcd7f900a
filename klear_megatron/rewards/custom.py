"""Reward functions of the user's own."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType

from klear_megatron.errors import UserError
from klear_megatron.rewards.reward import Reward, is_formatted

CustomReward = Callable[
    [str, str | list[str], str], float | Reward | Awaitable[float] | Awaitable[Reward]
]
"""`f(response, ground_truth, data_source)`; with a plain score, correct is what scores above 0."""


@functools.cache
def import_function(path: str) -> CustomReward:
    """The function that `package.module:function` or `some/file.py:function` names.

    Raises:
        UserError: there is no such function.
    """
    module, _, name = path.rpartition(":")
    try:
        if module.endswith(".py"):
            function = getattr(_import_file(Path(module)), name)
        else:
            function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise UserError(f"rewards.custom.function: cannot import {path!r}: {error}") from error
    if not callable(function):
        raise UserError(f"rewards.custom.function: {path!r} is not a function")
    return function


def is_async(function: CustomReward) -> bool:
    return inspect.iscoroutinefunction(function)


def as_reward(value: object, response: str, path: str) -> Reward:
    """Raises UserError where a function has returned neither a number nor a Reward."""
    if isinstance(value, Reward):
        return value
    if isinstance(value, (int, float)):
        score = float(value)
        return Reward(score=score, correct=score > 0, formatted=is_formatted(response))
    raise UserError(
        f"rewards.custom.function: {path} returned {value!r}; it has to return a number or a Reward"
    )


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
