"""CISPO: the ratio as a clipped, constant weight (arXiv 2506.13585; Eq. 15-16 of 2508.07629)."""

from typing import Literal

from torch import Tensor

from klear_megatron.losses.clipped import clipped_inputs, clipping_metrics
from klear_megatron.losses.config import ClippedLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class CISPOConfig(ClippedLossConfig):
    """Options of `cispo`."""

    name: Literal["cispo"] = "cispo"


def cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """Per-token loss -F * A, with gradient -F * A, F = clip(ratio, 1 - clip_low, 1 + clip_high).

    Args and returns as `gppo`.
    """
    factor = ratio_of(log_probs, old_log_probs).clamp(1 - clip_low, 1 + clip_high)
    return surrogate(log_probs, factor, advantages)


def cispo_loss(inputs: LossInputs, config: CISPOConfig) -> TokenLoss:
    """`cispo` with the config's options."""
    values = cispo(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    low, high = clipped_inputs(inputs, config)
    return TokenLoss(values, clipping_metrics(low, high, kept=low | high))
