"""Group-relative advantages."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(reward - mean) / std over the responses of one prompt.

    The standard deviation is that of a sample (divided by n - 1). A group of one response, or of
    equal rewards, says nothing about which is better: its advantages are exactly 0.

    Args:
        rewards: [responses], finite.
        groups: [responses], integers; responses of the same prompt have the same one.

    Returns:
        [responses], of the dtype of `rewards`.
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = groups == group
        values = rewards[mine]
        # Not `std() > 0`: the mean of equal numbers may be off by a rounding error.
        if values.min() < values.max():
            advantages[mine] = (values - values.mean()) / values.std()
    return advantages
