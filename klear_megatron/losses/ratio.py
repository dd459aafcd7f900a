"""A ratio of probabilities that cannot overflow."""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 60.0
"""The ratio saturates at e^60 = 1e26: far beyond any use, and its products fit into float32."""


def ratio_of(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """The ratio pi / pi_old of each token, without gradient, in float32 or wider."""
    wide = torch.promote_types(
        torch.promote_types(log_probs.dtype, old_log_probs.dtype), torch.float32
    )
    log_ratio = log_probs.detach().to(wide) - old_log_probs.detach().to(wide)
    return log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
