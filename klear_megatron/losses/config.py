"""Settings that every policy loss has."""

from typing import Literal

from pydantic import Field, model_validator

from klear_megatron.losses.corrections import CorrectionOptions
from klear_megatron.losses.kl import KLConfig

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


class PolicyLossConfig(CorrectionOptions):
    """What stands beside the loss of a token. Each loss adds its name and options of its own."""

    aggregation: Aggregation = "token_mean"
    """How the losses of a mini-batch's trained tokens become one number: their mean; the mean over
    responses of each one's mean, as in GRPO (arXiv 2402.03300); or the mean over responses of each
    one's sum over `sum_divisor`, as in Dr. GRPO (arXiv 2503.20783). A response without trained
    tokens counts nowhere."""
    sum_divisor: float = Field(1.0, gt=0)
    """The divisor of sequence_sum: a constant such as the longest response's length."""
    sft_alpha: float = Field(0.1, ge=0)
    """Weight of the negative log-likelihood of correct responses; 0 turns it off."""
    entropy_coeff: float = Field(0.0, ge=0)
    """Weight of the entropy bonus, which is aggregated like the policy loss. With 0, no gradient of
    the entropy is computed."""
    kl: KLConfig | None = None
    """A penalty on the distance from a reference policy."""

    @property
    def uses_old_entropy(self) -> bool:
        """Whether the loss needs the entropies before the first update on the responses."""
        return False

    @model_validator(mode="after")
    def _check_divisor(self) -> "PolicyLossConfig":
        if self.sum_divisor != 1 and self.aggregation != "sequence_sum":
            raise ValueError("sum_divisor has no effect without aggregation: sequence_sum")
        return self


class ClippedLossConfig(PolicyLossConfig):
    """Options of a loss that clips the ratio to [1 - clip_low, 1 + clip_high]."""

    clip_low: float = Field(0.2, ge=0, lt=1)
    """The ratio is clipped below 1 minus this."""
    clip_high: float = Field(0.28, ge=0)
    """The ratio is clipped above 1 plus this."""
