"""What the clipped losses share: a ratio that cannot overflow, and a loss with a given gradient."""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 60.0
"""The ratio saturates at e^60 = 1e26: far beyond any use, and finite in float32 times anything."""


def ratio_of(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """pi / pi_old per token, without gradient, in float32 or wider."""
    wide = torch.promote_types(
        torch.promote_types(log_probs.dtype, old_log_probs.dtype), torch.float32
    )
    log_ratio = log_probs.detach().to(wide) - old_log_probs.to(wide)
    return log_ratio.clamp(max=_MAX_LOG_RATIO).exp()


def surrogate(
    log_probs: Tensor, factor: Tensor, advantages: Tensor, *, stopped: Tensor | None = None
) -> Tensor:
    """A loss of value -factor * advantages, and of the same gradient with respect to `log_probs`.

    This is Eq. 11's `bound / sg(ratio) * ratio` in log space, where nothing is divided by a ratio
    that may be zero.

    Args:
        factor: constant, same shape as the others.
        stopped: where true, the gradient is zero.
    """
    wide = log_probs.to(factor.dtype)
    # Zero with gradient one; a number minus itself is exactly zero however large it is.
    differentiable_zero = wide - wide.detach()
    if stopped is not None:
        differentiable_zero = differentiable_zero.masked_fill(stopped, 0)
    return -factor * advantages * (1 + differentiable_zero)


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Which tokens are below, and which above, the clip range on the side that bounds them."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return low, high


def clipping_metrics(low: Tensor, high: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Metrics of a clipped loss.

    Args:
        low, high: from `clipped_tokens`.
        kept: which of those still have a gradient.
    """
    return {"clipped_low": low, "clipped_high": high, "clipped_gradient_kept": kept}
