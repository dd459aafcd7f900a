"""Which tokens are clipped, and what is reported about them."""

from torch import Tensor

from klear_megatron.losses.config import ClippedLossConfig
from klear_megatron.losses.inputs import LossInputs
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.observability import Metric


def clipped_tokens(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Which tokens are below, and which above, the clip range on the side that bounds them."""
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return low, high


CLIPPING_METRICS = (
    Metric(
        "clipped_low",
        "share",
        "trained tokens whose probability fell by more than `clip_low`, with a negative advantage",
        "above 0.1: the weights move too far within a step",
    ),
    Metric(
        "clipped_high",
        "share",
        "trained tokens whose probability rose by more than `clip_high`, with a positive advantage",
        "above 0.1: the weights move too far within a step",
    ),
    Metric(
        "clipped_gradient_kept",
        "share",
        "trained tokens that are clipped and still have a gradient, which is what GPPO is about",
        "0 with gppo while tokens are clipped",
    ),
)


def clipping_metrics(low: Tensor, high: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Metrics of a clipped loss.

    Args:
        low, high: from `clipped_tokens`.
        kept: which of those still have a gradient.
    """
    return {"clipped_low": low, "clipped_high": high, "clipped_gradient_kept": kept}


def clipped_inputs(inputs: LossInputs, config: ClippedLossConfig) -> tuple[Tensor, Tensor]:
    """`clipped_tokens` by each token's own ratio and the config's clip range."""
    ratio = ratio_of(inputs.log_probs, inputs.old_log_probs)
    return clipped_tokens(ratio, inputs.advantages, config.clip_low, config.clip_high)
