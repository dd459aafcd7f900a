"""GPPO: clipping that keeps clipped tokens' gradients (arXiv 2508.07629, Eq. 11-12, 17-18)."""

from torch import Tensor

from klear_megatron.losses.surrogate import ratio_of, surrogate


def gppo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    dual_clip: float | None = None,
    dual_clip_keeps_gradient: bool = True,
) -> Tensor:
    """Per-token loss -F * A, with gradient -F * A with respect to the log-probability, where

        F = beta_low  * (1 - clip_low)     if ratio < 1 - clip_low  and A < 0
            beta_high * (1 + clip_high)    if ratio > 1 + clip_high and A > 0
            dual_clip                      if ratio > dual_clip     and A < 0
            ratio                          otherwise

    With both betas 1 the value is that of clip-higher (`ppo_clip`); its gradient differs only where
    clip-higher's is zero.

    Args:
        log_probs: of the policy, any shape and floating dtype, differentiable.
        old_log_probs: of the policy that the responses were drawn from, same shape.
        advantages: same shape.
        dual_clip: bound on the ratio of tokens with a negative advantage; None leaves it unbounded.
        dual_clip_keeps_gradient: False makes the gradient zero beyond `dual_clip`, as the authors'
            code does, against Eq. 12.

    Returns:
        same shape, float32 (float64 if an input is). Finite for any finite log-probabilities.
    """
    ratio = ratio_of(log_probs, old_log_probs)
    clipped_low = (ratio < 1 - clip_low) & (advantages < 0)
    clipped_high = (ratio > 1 + clip_high) & (advantages > 0)
    factor = ratio.masked_fill(clipped_low, beta_low * (1 - clip_low))
    factor = factor.masked_fill(clipped_high, beta_high * (1 + clip_high))
    if dual_clip is None:
        return surrogate(log_probs, factor, advantages)
    beyond = (ratio > dual_clip) & (advantages < 0)
    factor = factor.masked_fill(beyond, dual_clip)
    stopped = None if dual_clip_keeps_gradient else beyond
    return surrogate(log_probs, factor, advantages, stopped=stopped)
