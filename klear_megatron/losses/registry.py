"""Finding the loss that a config names."""

import importlib
import inspect
from functools import partial
from typing import Protocol

from torch import Tensor

from klear_megatron.errors import UserError, nearest
from klear_megatron.losses.cispo import cispo
from klear_megatron.losses.config import LossConfig
from klear_megatron.losses.gppo import gppo
from klear_megatron.losses.ppo_clip import ppo_clip


class TokenLoss(Protocol):
    """A per-token loss, its options filled in."""

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor: ...


_LOSSES = {"gppo": gppo, "ppo_clip": ppo_clip, "cispo": cispo}


def resolve_loss(config: LossConfig) -> TokenLoss:
    """The function that `config.name` names, with the config's clip range and options.

    Raises:
        UserError: no such loss, or an option that it does not have.
    """
    loss = _import(config.name) if ":" in config.name else _LOSSES.get(config.name)
    if loss is None:
        raise UserError(
            f"loss.name: {config.name!r} is unknown; known: {', '.join(sorted(_LOSSES))}, or your "
            "own as package.module:function"
        )
    known = [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    options = {"clip_low": config.clip_low, "clip_high": config.clip_high, **config.options}
    if "dual_clip" in known:
        options.setdefault("dual_clip", config.dual_clip)
    for option in options:
        if option not in known:
            raise UserError(
                f"loss.options.{option}: the loss {config.name} has no such option; "
                f"{nearest(option, known)}"
            )
    return partial(loss, **options)


def _import(path: str) -> TokenLoss:
    module, _, name = path.partition(":")
    try:
        loss: TokenLoss = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"loss.name: cannot import {path!r}: {error}") from error
    return loss
