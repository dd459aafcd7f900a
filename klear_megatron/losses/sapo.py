"""SAPO: a smooth gate on the ratio instead of a clip (arXiv 2511.20347)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from klear_megatron.losses.config import Aggregation, PolicyLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class SAPOConfig(PolicyLossConfig):
    """Options of `sapo`; the defaults are the paper's."""

    name: Literal["sapo"] = "sapo"
    tau_positive: float = Field(1.0, gt=0)
    """How fast the gradient falls with the ratio's distance from 1 where A > 0."""
    tau_negative: float = Field(1.05, gt=0)
    """The same elsewhere; larger, because lowering a token raises all others."""
    aggregation: Aggregation = "sequence_mean"


def sapo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """Per-token loss -F * A with F = 4 / tau * s and s = sigmoid(tau * (ratio - 1)).

    The gradient with respect to the log-probability is -4 * s * (1 - s) * ratio * A: that of the
    policy gradient where the ratio is 1, and less the further away it is. F is 2 / tau there.

    Args and returns as `gppo`.
    """
    ratio = ratio_of(log_probs, old_log_probs)
    positive = advantages > 0
    tau = (ratio * 0 + tau_negative).masked_fill(positive, tau_positive)
    gate = (tau * (ratio - 1)).sigmoid()
    slope = 4 * gate * (1 - gate) * ratio
    return surrogate(log_probs, 4 / tau * gate, advantages, gradient=slope)


def sapo_loss(inputs: LossInputs, config: SAPOConfig) -> TokenLoss:
    """`sapo` with the config's options."""
    values = sapo(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        tau_positive=config.tau_positive,
        tau_negative=config.tau_negative,
    )
    return TokenLoss(values)
