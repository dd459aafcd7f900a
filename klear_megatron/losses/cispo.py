"""CISPO: the ratio as a clipped, constant weight (arXiv 2506.13585; Eq. 15-16 of 2508.07629)."""

from torch import Tensor

from klear_megatron.losses.surrogate import ratio_of, surrogate


def cispo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    """Per-token loss -F * A, with gradient -F * A, F = clip(ratio, 1 - clip_low, 1 + clip_high).

    Args and returns as `gppo`.
    """
    factor = ratio_of(log_probs, old_log_probs).clamp(1 - clip_low, 1 + clip_high)
    return surrogate(log_probs, factor, advantages)
