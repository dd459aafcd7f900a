"""Settings that every policy loss has."""

from pydantic import Field

from klear_megatron.config import Section


class PolicyLossConfig(Section):
    """What stands beside the loss of a token. Each loss adds its name and options of its own."""

    sft_alpha: float = Field(0.1, ge=0)
    """Weight of the negative log-likelihood of correct responses; 0 turns it off."""
    tis_clip: float | None = Field(None, ge=1)
    """Truncated importance sampling (Yao et al. 2025): each token's policy loss is multiplied by
    the ratio of its probability in the trainer to that in the server that drew it, at most by this;
    2.0 is usual. The two differ in rounding, as with FP8 or bfloat16."""
