"""GSPO: one ratio for a whole response (arXiv 2507.18071)."""

from typing import Literal

import torch
from pydantic import Field

from klear_megatron.losses.clipped import clipped_tokens, clipping_metrics
from klear_megatron.losses.config import Aggregation, ClippedLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class GSPOConfig(ClippedLossConfig):
    """Options of `gspo_loss`. The clip range is the paper's; ratios of sequences are near 1."""

    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, ge=0, lt=1)
    clip_high: float = Field(4e-4, ge=0)
    aggregation: Aggregation = "sequence_mean"


def gspo_loss(inputs: LossInputs, config: GSPOConfig) -> TokenLoss:
    """Per-token loss -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A), where s is the same for
    all tokens of a response: the geometric mean of its trained tokens' ratios (Eq. 7).

    This is the paper's token form (section 4.3): s is a constant, and the gradient with respect to
    a token's log-probability is -s * A, or zero where clipped. With `aggregation: sequence_mean`
    and one advantage for all tokens of a response, value and gradient are those of Eq. 5.
    """
    log_ratio = inputs.log_probs.detach() - inputs.old_log_probs
    means = inputs.sequences.spread(inputs.sequences.means(log_ratio, inputs.mask))
    ratio = ratio_of(means, torch.zeros_like(means))
    low, high = clipped_tokens(ratio, inputs.advantages, config.clip_low, config.clip_high)
    factor = ratio.where(~(low | high), ratio.clamp(1 - config.clip_low, 1 + config.clip_high))
    values = surrogate(inputs.log_probs, factor, inputs.advantages, stopped=low | high)
    return TokenLoss(values, clipping_metrics(low, high, kept=torch.zeros_like(low)))
