"""Corrections of the mismatch: the trainer computes other probabilities than the server that drew.

The two differ in rounding, as with FP8 or bfloat16, and where the tokens are stale. What corrects
for it is the ratio of a token's old probability in the trainer to that in the server, a constant:
as a weight of the token's policy loss, and as a reason to leave a token or a response out.
"""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from klear_megatron.config import Section
from klear_megatron.errors import UserError
from klear_megatron.losses.inputs import Fields, LossInputs, Sequences
from klear_megatron.losses.ratio import ratio_of


def _around_one(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 <= low <= 1 <= high:
        raise ValueError("has to be [low, high] with 0 <= low <= 1 <= high")
    return bounds


Bounds = Annotated[tuple[float, float], AfterValidator(_around_one)]
"""The smallest and the largest ratio of what is trained."""


class CorrectionOptions(Section):
    """How the mismatch is corrected. If any correction is set, each token's policy loss is
    multiplied by its ratio, within `tis_floor` and `tis_clip`."""

    tis_clip: float | None = Field(None, ge=1)
    """Truncated importance sampling (Yao et al. 2025): the upper bound of the weight; 2.0 is
    usual."""
    tis_floor: float | None = Field(None, gt=0, le=1)
    """The lower bound of the weight."""
    token_mask: Bounds | None = None
    """Tokens with a ratio outside are not trained, as in IcePop (Ling team 2025), whose authors
    use [0.5, 5.0]."""
    sequence_mask: Bounds | None = None
    """Responses with a ratio outside are not trained: masked importance sampling (Liu et al.
    2025)."""
    sequence_mask_by: Literal["geometric", "product"] = "geometric"
    """The ratio of a response: the geometric mean of its tokens' ratios, or their product, which
    gets further from 1 the longer the response is."""

    @property
    def corrects_mismatch(self) -> bool:
        """Whether anything is done."""
        return any(one is not None for one in (self.tis_clip, self.token_mask, self.sequence_mask))

    @model_validator(mode="after")
    def _check_corrections(self) -> "CorrectionOptions":
        if self.tis_floor is not None and not self.corrects_mismatch:
            raise ValueError("tis_floor has no effect without tis_clip or a mask")
        if self.sequence_mask is None and self.sequence_mask_by != "geometric":
            raise ValueError("sequence_mask_by has no effect without sequence_mask")
        return self


def drawn_tokens(fields: Fields) -> Tensor:
    """[T] 1 on the tokens of `loss_mask`, except where the server reported NaN or an infinite
    number as the log-probability of a token that it drew."""
    mask = fields["loss_mask"]
    if "rollout_log_probs" in fields:
        mask = mask * fields["rollout_log_probs"].isfinite()
    return mask


def trained_tokens(fields: Fields, sequences: Sequences, options: CorrectionOptions) -> Tensor:
    """[T] 1 on the tokens to train: `drawn_tokens` without those that a mask leaves out.

    Raises:
        UserError: the masks need the servers' log-probabilities, which the batch does not have.
    """
    mask = drawn_tokens(fields)
    if options.token_mask is None and options.sequence_mask is None:
        return mask
    if "rollout_log_probs" not in fields:
        raise _missing()
    old = fields["old_log_probs"]
    rollout = finite_log_probs(fields["rollout_log_probs"], old)
    log_ratio = (old - rollout) * mask
    kept = mask
    if options.token_mask is not None:
        kept = kept * _within(log_ratio, options.token_mask)
    if options.sequence_mask is not None:
        by_mean = options.sequence_mask_by == "geometric"
        whole = sequences.means(log_ratio, mask) if by_mean else sequences.sums(log_ratio)
        kept = kept * sequences.spread(_within(whole, options.sequence_mask))
    return kept


def importance_weight(inputs: LossInputs, options: CorrectionOptions) -> tuple[Tensor, Tensor]:
    """The weight of each token's policy loss, and where a bound changed it: [T] each.

    Raises:
        UserError: the batch does not have the servers' log-probabilities.
    """
    if inputs.rollout_log_probs is None:
        raise _missing()
    ratio = ratio_of(inputs.old_log_probs, inputs.rollout_log_probs)
    weight = ratio.clamp(options.tis_floor or 0.0, options.tis_clip or math.inf)
    return weight, weight != ratio


def finite_log_probs(rollout: Tensor, old: Tensor) -> Tensor:
    """The servers' log-probabilities; where they are not finite, the trainer's."""
    return rollout.where(rollout.isfinite(), old)


def _within(log_ratio: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Bounds of the logarithm, since a product of ratios may not fit into a float."""
    low, high = (math.log(bound) if bound else -math.inf for bound in bounds)
    return (log_ratio >= low) & (log_ratio <= high)


def _missing() -> UserError:
    return UserError(
        "loss: tis_clip, token_mask and sequence_mask need the servers' log-probabilities, and the "
        "batch has no rollout_log_probs"
    )
