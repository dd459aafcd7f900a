"""DPPO: a trust region by the divergence of policies instead of the ratio (arXiv 2602.04879)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from klear_megatron.losses.clipped import clipping_metrics
from klear_megatron.losses.config import PolicyLossConfig
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.surrogate import surrogate

Divergence = Literal["tv", "kl"]
_BOUNDS: dict[Divergence, float] = {"tv": 0.15, "kl": 0.05}


class DPPOConfig(PolicyLossConfig):
    """Options of `dppo`."""

    name: Literal["dppo"] = "dppo"
    divergence: Divergence = "tv"
    """Of the two distributions over «this token» and «any other»: their total variation, which is
    the difference of the token's probabilities, or KL(old || new)."""
    bound_low: float | None = Field(None, ge=0)
    """Largest divergence of a token that gets less likely, where A < 0; by default
    0.15 of `tv` or 0.05 of `kl`, as in the authors' script for verl."""
    bound_high: float | None = Field(None, ge=0)
    """Largest divergence of a token that gets more likely, where A > 0; by default the same."""
    ratio_clip: float = Field(20.0, gt=1)
    """Upper bound of the ratio that weighs the gradient."""


def dppo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    divergence: Divergence = "tv",
    bound_low: float | None = None,
    bound_high: float | None = None,
    ratio_clip: float = 20.0,
) -> Tensor:
    """Per-token loss -F * A with F = min(ratio, ratio_clip), and gradient -F * A, which is zero for
    a token that the trust region stops: see `beyond_trust_region`.

    Args and returns as `gppo`.
    """
    low, high = beyond_trust_region(
        log_probs, old_log_probs, advantages, divergence, bound_low, bound_high
    )
    factor = ratio_of(log_probs, old_log_probs).clamp(max=ratio_clip)
    return surrogate(log_probs, factor, advantages, stopped=low | high)


def beyond_trust_region(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    divergence: Divergence,
    bound_low: float | None,
    bound_high: float | None,
) -> tuple[Tensor, Tensor]:
    """Which tokens are already further than the bound below, and which above, their old
    probability, on the side that their advantage pushes them to."""
    wide = torch.promote_types(log_probs.dtype, torch.float32)
    new, old = log_probs.detach().to(wide), old_log_probs.to(wide)
    distance = (new.exp() - old.exp()).abs() if divergence == "tv" else _binary_kl(old, new)
    lowest, highest = (
        _BOUNDS[divergence] if bound is None else bound for bound in (bound_low, bound_high)
    )
    low = (distance > lowest) & (new < old) & (advantages < 0)
    high = (distance > highest) & (new > old) & (advantages > 0)
    return low, high


def _binary_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL(old || new) of the distributions over «this token» and «any other»."""
    # Not 1 - p, which is 0 for every p near 1; and not the logarithm of 0.
    others_old, others_new = (
        (-torch.expm1(one)).clamp(min=torch.finfo(torch.float32).tiny) for one in (old, new)
    )
    return old.exp() * (old - new) + others_old * (others_old.log() - others_new.log())


def dppo_loss(inputs: LossInputs, config: DPPOConfig) -> TokenLoss:
    """`dppo` with the config's options."""
    arguments = inputs.log_probs, inputs.old_log_probs, inputs.advantages
    values = dppo(
        *arguments,
        divergence=config.divergence,
        bound_low=config.bound_low,
        bound_high=config.bound_high,
        ratio_clip=config.ratio_clip,
    )
    low, high = beyond_trust_region(
        *arguments, config.divergence, config.bound_low, config.bound_high
    )
    return TokenLoss(values, clipping_metrics(low, high, kept=torch.zeros_like(low)))
