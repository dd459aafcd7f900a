"""The divergence of the policy from a reference, estimated from the tokens that were drawn."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from klear_megatron.config import Section
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate

KLEstimator = Literal["k1", "k2", "k3"]


class KLConfig(Section):
    """A penalty on KL(policy || reference)."""

    coeff: float = Field(gt=0)
    """Weight of the penalty."""
    estimator: KLEstimator = "k3"
    """With l the log-probability less the reference's: k1 is l, k2 is l^2 / 2, k3 is
    exp(-l) - 1 + l (Schulman 2020)."""
    within: Literal["loss", "reward"] = "loss"
    """In the loss, the estimate is differentiated and aggregated like the policy loss. In the
    reward, each token's advantage is lowered by it, before the first update, as in the baseline
    form of REINFORCE++. Use k1 in the reward only: in the loss its mean gradient is 0."""
    reference: Path | None = None
    """The reference's weights, in any form that `policy.path` may have; by default its own."""


def kl_to_reference(log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """The estimate for each token, with its derivative by the log-probability.

    Args:
        log_probs: of the policy, any shape and floating dtype, differentiable.
        ref_log_probs: same shape.

    Returns:
        same shape, float32 (float64 if an input is). Finite for any finite log-probabilities.
    """
    inverse = ratio_of(ref_log_probs, log_probs)
    log_ratio = log_probs.detach().to(inverse.dtype) - ref_log_probs.to(inverse.dtype)
    match estimator:
        case "k1":
            value, slope = log_ratio, torch.ones_like(log_ratio)
        case "k2":
            value, slope = log_ratio**2 / 2, log_ratio
        case "k3":
            value, slope = inverse - 1 + log_ratio, 1 - inverse
    return surrogate(log_probs, value, -torch.ones_like(value), gradient=slope)
