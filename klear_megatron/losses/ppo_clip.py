"""PPO's clipped objective: symmetric, clip-higher, and dual clip."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from klear_megatron.losses.clipped import clipped_inputs, clipped_tokens, clipping_metrics
from klear_megatron.losses.entropy_ratio import EntropyRatioOptions, entropy_clipped
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class PPOClipConfig(EntropyRatioOptions):
    """Options of `ppo_clip`."""

    name: Literal["ppo_clip"] = "ppo_clip"
    dual_clip: float | None = Field(10.0, gt=1)
    """Bound on the ratio of tokens with a negative advantage."""


def ppo_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> Tensor:
    """Per-token loss -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    Clip-higher (DAPO, arXiv 2503.14476) by default; `clip_high = clip_low` is PPO's symmetric form.
    With `dual_clip` (arXiv 1912.09729) the loss of a token with A < 0 is at most -dual_clip * A.
    The gradient of a clipped token is zero.

    Args and returns as `gppo`.
    """
    ratio = ratio_of(log_probs, old_log_probs)
    low, high = clipped_tokens(ratio, advantages, clip_low, clip_high)
    clipped = low | high
    factor = ratio.where(~clipped, ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        beyond = (ratio > dual_clip) & (advantages < 0)
        factor = factor.masked_fill(beyond, dual_clip)
        clipped = clipped | beyond
    return surrogate(log_probs, factor, advantages, stopped=clipped)


def ppo_clip_loss(inputs: LossInputs, config: PPOClipConfig) -> TokenLoss:
    """`ppo_clip` with the config's options."""
    values = ppo_clip(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    low, high = clipped_inputs(inputs, config)
    loss = TokenLoss(values, clipping_metrics(low, high, kept=torch.zeros_like(low)))
    return entropy_clipped(loss, inputs, config)
