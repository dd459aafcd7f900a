"""What losses share: a loss with a given gradient, and which tokens are clipped."""

from torch import Tensor

from klear_megatron.losses.config import ClippedLossConfig
from klear_megatron.losses.inputs import LossInputs
from klear_megatron.losses.ratio import ratio_of


def surrogate(
    log_probs: Tensor,
    factor: Tensor,
    advantages: Tensor,
    *,
    gradient: Tensor | None = None,
    stopped: Tensor | None = None,
) -> Tensor:
    """A loss whose value is -factor * advantages and whose gradient by `log_probs` is the same.

    This is Eq. 11's `bound / sg(ratio) * ratio` in log space, which divides by no ratio: one that
    underflows to zero does no harm.

    Args:
        factor: same shape as the others, without gradient.
        gradient: same shape; takes the factor's place in the gradient.
        stopped: same shape, bool; where true, the gradient is zero.
    """
    wide = log_probs.to(factor.dtype)
    # Zero with a gradient of one: a finite number minus itself is exactly zero.
    differentiable_zero = wide - wide.detach()
    if stopped is not None:
        differentiable_zero = differentiable_zero.masked_fill(stopped, 0)
    values = -factor * advantages
    slopes = values if gradient is None else -gradient * advantages
    return values + slopes * differentiable_zero


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Which tokens are below, and which above, the clip range on the side that bounds them."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return low, high


def clipped_inputs(inputs: LossInputs, config: ClippedLossConfig) -> tuple[Tensor, Tensor]:
    """`clipped_tokens` by each token's own ratio and the config's clip range."""
    ratio = ratio_of(inputs.log_probs, inputs.old_log_probs)
    return clipped_tokens(ratio, inputs.advantages, config.clip_low, config.clip_high)


def clipping_metrics(low: Tensor, high: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Metrics of a clipped loss.

    Args:
        low, high: from `clipped_tokens`.
        kept: which of those still have a gradient.
    """
    return {"clipped_low": low, "clipped_high": high, "clipped_gradient_kept": kept}
