"""From per-token losses to what one optimizer step minimises, normalised over the whole mini-batch.

The denominators are counted once, from the fields of the whole mini-batch, before anything is
computed. Each micro-batch contributes plain sums over them, so loss, gradients and metrics are the
same however the mini-batch is cut over ranks and micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from klear_megatron.losses.config import LossConfig
from klear_megatron.losses.registry import TokenLoss, resolve_loss
from klear_megatron.losses.surrogate import ratio_of

Fields = Mapping[str, Tensor]
"""name -> [tokens] float32, aligned with the log-probabilities."""


@dataclass(frozen=True)
class Result:
    """What a part of a mini-batch contributes."""

    loss: Tensor
    """Scalar; the parts of a mini-batch add up to its loss."""
    sums: dict[str, Tensor]
    """Metrics that add up over the parts, as scalars without gradient."""
    extremes: dict[str, Tensor] = field(default_factory=dict)
    """Values [tokens] whose smallest and largest over the mini-batch become NAME_min, NAME_max."""


class Objective(Protocol):
    """What `Learner.train_step` minimises."""

    def denominators(self, fields: Fields) -> dict[str, float]:
        """Counted on the fields of the whole mini-batch."""

    def __call__(
        self, log_probs: Tensor, entropy: Tensor, fields: Fields, denominators: Mapping[str, float]
    ) -> Result:
        """The contribution of some tokens: log_probs, entropy and every field are [tokens]."""


class SFTObjective:
    """Mean negative log-likelihood of the tokens where `loss_mask` is 1."""

    def denominators(self, fields: Fields) -> dict[str, float]:
        return {"tokens": max(float(fields["loss_mask"].sum()), 1.0)}

    def __call__(
        self, log_probs: Tensor, entropy: Tensor, fields: Fields, denominators: Mapping[str, float]
    ) -> Result:
        weight = fields["loss_mask"] / denominators["tokens"]
        loss = -(log_probs * weight).sum()
        return Result(loss, {"loss": loss.detach(), "entropy": (entropy * weight).sum()})


class PolicyObjective:
    """A clipped policy loss plus alpha times the SFT term on correct responses (Eq. 7, 13-14).

    Fields: `loss_mask` is 1 on the response tokens that are trained, `correct` is 1 on those of
    correct responses; `advantages` and `old_log_probs` are the loss's; `rollout_log_probs`, the
    servers' own, are needed for `tis_clip`. The policy loss is a mean over the trained tokens, the
    SFT term over the trained tokens of correct responses.
    """

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._token_loss: TokenLoss = resolve_loss(config)

    def denominators(self, fields: Fields) -> dict[str, float]:
        mask = fields["loss_mask"]
        return {
            "tokens": max(float(mask.sum()), 1.0),
            "correct_tokens": max(float((mask * fields["correct"]).sum()), 1.0),
        }

    def __call__(
        self, log_probs: Tensor, entropy: Tensor, fields: Fields, denominators: Mapping[str, float]
    ) -> Result:
        mask = fields["loss_mask"]
        weight = mask / denominators["tokens"]
        sft_weight = mask * fields["correct"] / denominators["correct_tokens"]
        old, advantages = fields["old_log_probs"], fields["advantages"]

        token_loss = self._token_loss(log_probs, old, advantages)
        correction_sums = {}
        if self._config.tis_clip is not None:
            mismatch = ratio_of(old, fields["rollout_log_probs"])
            correction = mismatch.clamp(max=self._config.tis_clip)
            token_loss = token_loss * correction
            correction_sums = {
                "tis_weight": (correction * weight).sum(),
                "tis_clipped": ((mismatch > self._config.tis_clip) * weight).sum(),
            }
        policy_loss = (token_loss * weight).sum()
        sft_loss = -(log_probs * sft_weight).sum()
        loss = policy_loss + self._config.sft_alpha * sft_loss

        log_ratio = (log_probs.detach() - old) * mask
        ratio = ratio_of(log_ratio, torch.zeros_like(log_ratio))
        clipped_low, clipped_high, kept = self._clipping(log_probs.detach(), old, advantages)
        sums = {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "sft_loss": sft_loss.detach(),
            "entropy": (entropy * weight).sum(),
            # Non-negative estimate of KL(old || new) from samples of old: r - 1 - log r.
            "kl_to_old": ((ratio - 1 - log_ratio) * weight).sum(),
            "clipped_low": (clipped_low * weight).sum(),
            "clipped_high": (clipped_high * weight).sum(),
            "clipped_gradient_kept": (kept * weight).sum(),
            **correction_sums,
        }
        return Result(loss, sums, {"ratio": ratio})

    def _clipping(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens are beyond the clip range on the side that it bounds, and which of those
        still have a gradient."""
        ratio = ratio_of(log_probs, old)
        low = (ratio < 1 - self._config.clip_low) & (advantages < 0)
        high = (ratio > 1 + self._config.clip_high) & (advantages > 0)
        with torch.enable_grad():
            leaf = log_probs.requires_grad_()
            (gradient,) = torch.autograd.grad(self._token_loss(leaf, old, advantages).sum(), leaf)
        return low, high, (low | high) & (gradient != 0)
