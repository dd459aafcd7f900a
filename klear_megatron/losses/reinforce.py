"""REINFORCE: the policy gradient itself (Williams 1992)."""

from typing import Literal

from torch import Tensor

from klear_megatron.losses.config import PolicyLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss


class REINFORCEConfig(PolicyLossConfig):
    """`reinforce` has no options of its own."""

    name: Literal["reinforce"] = "reinforce"


def reinforce(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token loss -A * log-probability, whose gradient is -A.

    There is no ratio: it is the right gradient for responses of the trained policy itself, so for
    one optimizer step on each response.

    Args and returns as `gppo`.
    """
    return -advantages * log_probs


def reinforce_loss(inputs: LossInputs, config: REINFORCEConfig) -> TokenLoss:
    """`reinforce` of the inputs."""
    return TokenLoss(reinforce(inputs.log_probs, inputs.advantages))
