"""GPPO: clipping that keeps clipped tokens' gradients (arXiv 2508.07629, Eq. 11-12, 17-18)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from klear_megatron.losses.clipped import clipped_inputs, clipped_tokens, clipping_metrics
from klear_megatron.losses.entropy_ratio import EntropyRatioOptions, entropy_clipped
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate


class GPPOOptions(EntropyRatioOptions):
    """Options of `gppo`, shared by its named settings."""

    beta_low: float = Field(1.0, ge=0)
    """Scales the loss of tokens below the clip range; at 0 they are not trained."""
    beta_high: float = Field(1.0, ge=0)
    """Scales the loss of tokens above the clip range; at 0 they are not trained."""
    dual_clip: float | None = Field(10.0, gt=1)
    """Bound on the ratio of tokens with a negative advantage."""
    dual_clip_keeps_gradient: bool = True
    """False makes the gradient zero beyond `dual_clip`, as the authors' code does."""


class GPPOConfig(GPPOOptions):
    """GPPO as its paper has it: tokens below and above the clip range count in full."""

    name: Literal["gppo"] = "gppo"


class CEGPPOConfig(GPPOOptions):
    """CE-GPPO (arXiv 2509.20712), with the betas that its authors found best: tokens below the clip
    range count less, because making unlikely tokens unlikelier lowers the entropy."""

    name: Literal["ce_gppo"] = "ce_gppo"
    beta_low: float = Field(0.75, ge=0)


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
    low, high = clipped_tokens(ratio, advantages, clip_low, clip_high)
    factor = ratio.masked_fill(low, beta_low * (1 - clip_low))
    factor = factor.masked_fill(high, beta_high * (1 + clip_high))
    if dual_clip is None:
        return surrogate(log_probs, factor, advantages)
    beyond = (ratio > dual_clip) & (advantages < 0)
    factor = factor.masked_fill(beyond, dual_clip)
    stopped = None if dual_clip_keeps_gradient else beyond
    return surrogate(log_probs, factor, advantages, stopped=stopped)


def gppo_loss(inputs: LossInputs, config: GPPOOptions) -> TokenLoss:
    """`gppo` with the config's options."""
    values = gppo(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        beta_low=config.beta_low,
        beta_high=config.beta_high,
        dual_clip=config.dual_clip,
        dual_clip_keeps_gradient=config.dual_clip_keeps_gradient,
    )
    low, high = clipped_inputs(inputs, config)
    kept = (low & (config.beta_low > 0)) | (high & (config.beta_high > 0))
    loss = TokenLoss(values, clipping_metrics(low, high, kept))
    return entropy_clipped(loss, inputs, config)
