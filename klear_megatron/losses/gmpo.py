"""GMPO: the geometric mean of a response's ratios instead of their mean (arXiv 2507.20673)."""

from typing import Literal

import torch
from pydantic import Field

from klear_megatron.losses.clipped import clipping_metrics
from klear_megatron.losses.config import Aggregation, PolicyLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class GMPOConfig(PolicyLossConfig):
    """Options of `gmpo_loss`; the defaults are the paper's."""

    name: Literal["gmpo"] = "gmpo"
    clip_low: float = Field(0.4, ge=0)
    """Lower bound of a token's log-ratio where A < 0: the ratio is at least exp(-clip_low)."""
    clip_high: float = Field(0.4, ge=0)
    """Upper bound of a token's log-ratio where A > 0: the ratio is at most exp(clip_high)."""
    aggregation: Aggregation = "sequence_mean"


def gmpo_loss(inputs: LossInputs, config: GMPOConfig) -> TokenLoss:
    """Per-token loss -g * A, where g is the same for all tokens of a response: the geometric mean
    of its trained tokens' ratios, each bounded on the side that its advantage would push it to.

    The gradient with respect to a token's log-probability is -g * A, or zero where its ratio is
    bounded. With `aggregation: sequence_mean` and one advantage for all tokens of a response, value
    and gradient are those of the paper's Eq. 4.
    """
    log_ratio = inputs.log_probs.detach() - inputs.old_log_probs
    low = (log_ratio < -config.clip_low) & (inputs.advantages < 0)
    high = (log_ratio > config.clip_high) & (inputs.advantages > 0)
    bounded = log_ratio.masked_fill(low, -config.clip_low).masked_fill(high, config.clip_high)
    means = inputs.sequences.spread(inputs.sequences.means(bounded, inputs.mask))
    factor = ratio_of(means, torch.zeros_like(means))
    values = surrogate(inputs.log_probs, factor, inputs.advantages, stopped=low | high)
    return TokenLoss(values, clipping_metrics(low, high, kept=torch.zeros_like(low)))
