"""Group-relative advantages."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """How much better each response is than the others to its prompt: (reward - mean) / std.

    Mean and standard deviation are over the prompt's responses; the latter is a sample's, with
    n - 1. One response alone and equal rewards do not show which is better: their advantages are
    exactly 0.

    Args:
        rewards: [responses], finite.
        groups: [responses], integers; the same for all responses to a prompt.

    Returns:
        [responses], with the dtype of `rewards`.
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = groups == group
        values = rewards[mine]
        # Not `std() > 0`: rounding can move the mean of equal numbers away from them.
        if values.min() < values.max():
            advantages[mine] = (values - values.mean()) / values.std()
    return advantages
