"""A loss with a given value and gradient."""

from torch import Tensor


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
