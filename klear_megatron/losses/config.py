"""Settings of the policy loss."""

from typing import Any

from pydantic import Field

from klear_megatron.config import Section


class LossConfig(Section):
    """Which loss each response token has, and the SFT term beside it."""

    name: str = "gppo"
    """gppo, ppo_clip, cispo, or a function of your own as `package.module:function`."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(10.0, gt=1)
    """Bound on the ratio of tokens with a negative advantage, for losses that have one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the loss, such as `beta_low`."""
    sft_alpha: float = Field(0.1, ge=0)
    """Weight of the negative log-likelihood of correct responses; 0 turns it off."""
    tis_clip: float | None = Field(None, ge=1)
    """Truncated importance sampling (Yao et al. 2025): each token's policy loss is multiplied by
    the ratio of its probability in the trainer to that in the server that drew it, but by this at
    most; 2.0 is usual. It corrects for the two reckoning differently, as in FP8 or bfloat16."""
