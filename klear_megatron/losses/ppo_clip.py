"""PPO's clipped objective: symmetric, clip-higher, and dual clip."""

from torch import Tensor

from klear_megatron.losses.surrogate import ratio_of, surrogate


def ppo_clip(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> Tensor:
    """Per-token loss -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).

    Clip-higher (DAPO, arXiv 2503.14476) by default; `clip_high = clip_low` is PPO's symmetric form.
    With `dual_clip` (arXiv 1912.09729) the loss of a token with A < 0 is at most -dual_clip * A.
    The gradient of a clipped token is zero.

    Args and returns as `gppo`.
    """
    ratio = ratio_of(log_probs, old_log_probs)
    clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | (
        (ratio > 1 + clip_high) & (advantages > 0)
    )
    factor = ratio.where(~clipped, ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        beyond = (ratio > dual_clip) & (advantages < 0)
        factor = factor.masked_fill(beyond, dual_clip)
        clipped = clipped | beyond
    return surrogate(log_probs, factor, advantages, stopped=clipped)
