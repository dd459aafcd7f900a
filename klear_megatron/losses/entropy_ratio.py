"""ERC: only tokens whose entropy has hardly changed are trained (arXiv 2512.05591)."""

from klear_megatron.errors import UserError
from klear_megatron.losses.config import ClippedLossConfig
from klear_megatron.losses.corrections import Bounds
from klear_megatron.losses.inputs import LossInputs, TokenLoss
from klear_megatron.observability import Metric

_EPSILON = 1e-8
"""Added to both entropies, so that two that are 0 have ratio 1."""

ENTROPY_CLIPPED = Metric(
    "entropy_clipped",
    "share",
    "with `loss.entropy_ratio`: trained tokens outside its bounds, which have no gradient",
    "above 0.2",
)


class EntropyRatioOptions(ClippedLossConfig):
    """The option of losses that entropy ratio clipping can be added to."""

    entropy_ratio: Bounds | None = None
    """Tokens are trained only while the ratio of the policy's entropy there to that before its
    first update on these responses lies between these; the paper's bounds are [0.95, 1.1]."""

    @property
    def uses_old_entropy(self) -> bool:
        return self.entropy_ratio is not None


def entropy_clipped(loss: TokenLoss, inputs: LossInputs, config: EntropyRatioOptions) -> TokenLoss:
    """`loss` with value and gradient 0 where the entropy's ratio is outside, as in the paper's
    Eq. 6: these tokens still count in the denominators.

    Raises:
        UserError: the batch has no old entropies.
    """
    if config.entropy_ratio is None:
        return loss
    if inputs.old_entropy is None:
        raise UserError("loss.entropy_ratio: the batch has no old_entropy")
    low, high = config.entropy_ratio
    ratio = (inputs.entropy + _EPSILON) / (inputs.old_entropy + _EPSILON)
    outside = (ratio <= low) | (ratio >= high)
    kept = loss.metrics["clipped_gradient_kept"] & ~outside
    metrics = {**loss.metrics, "clipped_gradient_kept": kept, "entropy_clipped": outside}
    return TokenLoss(loss.values.masked_fill(outside, 0), metrics)
