"""Advantages: how much better a response is than others, by its rewards."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from klear_megatron.config import Section
from klear_megatron.errors import UserError

Estimator = Literal[
    "grpo",
    "grpo_without_std",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "gdpo",
]
_WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo")


class AdvantageConfig(Section):
    """How rewards become advantages."""

    estimator: Estimator = "grpo"
    """`grpo`: (reward - mean) / std over the responses to the prompt (arXiv 2402.03300).
    `grpo_without_std`: reward - mean, as in Dr. GRPO (2503.20783). `rloo`: reward minus the mean of
    the others (2402.14740). `reinforce_plus_plus`: the reward; with `_baseline`, reward - mean
    (2501.03262); both are then whitened over the step's responses. `gdpo`: the weighted sum of each
    part of the reward, which is compared by itself as in `grpo`, then whitened (2601.05242)."""
    part_weights: Mapping[str, float] | None = None
    """Which parts of the reward `gdpo` compares, and their weights in the sum."""
    drop_equal: bool = True
    """Do not train on a group whose responses all have the same advantage, and draw another in its
    place as far as `max_generation_batches` allows. False trains on it: its policy loss has no
    gradient, but its tokens count in the mean, and its correct responses in the SFT term."""

    @model_validator(mode="after")
    def _check_parts(self) -> "AdvantageConfig":
        if (self.estimator == "gdpo") != bool(self.part_weights):
            raise ValueError("estimator: gdpo and part_weights need each other")
        return self

    @property
    def whitened(self) -> bool:
        """Whether the advantages of a step are whitened together."""
        return self.estimator in _WHITENED


def group_advantages(rewards: Tensor, groups: Tensor, estimator: Estimator = "grpo") -> Tensor:
    """How much better each response is than the others to its prompt: (reward - mean) / std.

    Mean and standard deviation are over the prompt's responses; the latter is a sample's, with
    n - 1. One response alone and equal rewards do not show which is better: their advantages are
    exactly 0, except those of `reinforce_plus_plus`, which are the rewards.

    Args:
        rewards: [responses], finite.
        groups: [responses], integers; the same for all responses to a prompt.
        estimator: see `AdvantageConfig`; what it does before whitening.

    Returns:
        [responses], with the dtype of `rewards`.
    """
    if estimator == "reinforce_plus_plus":
        return rewards
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = groups == group
        values = rewards[mine]
        # Not `std() > 0`: rounding can move the mean of equal numbers away from them.
        if values.min() < values.max():
            advantages[mine] = (values - values.mean()) / _scale(values, estimator)
    return advantages


def _scale(values: Tensor, estimator: Estimator) -> Tensor | float:
    match estimator:
        case "grpo" | "gdpo":
            return values.std()
        case "rloo":
            return (len(values) - 1) / len(values)
    return 1.0


def advantages_of(
    scores: list[float], parts: list[Mapping[str, float]], config: AdvantageConfig
) -> list[float]:
    """The advantages of the responses to one prompt over each other, before whitening.

    Args:
        scores, parts: of each response's reward.

    Raises:
        UserError: a reward does not have a part that `part_weights` names.
    """
    one_group = torch.zeros(len(scores), dtype=torch.int64)

    def compared(values: list[float]) -> Tensor:
        rewards = torch.tensor(values, dtype=torch.float64)
        return group_advantages(rewards, one_group, config.estimator)

    if not config.part_weights:
        return compared(scores).tolist()
    total = torch.zeros(len(scores), dtype=torch.float64)
    for name, weight in config.part_weights.items():
        if missing := [one for one in parts if name not in one]:
            raise UserError(
                f"advantages.part_weights: a reward has no part {name!r}; it has: "
                f"{', '.join(sorted(missing[0])) or 'none'}"
            )
        total += weight * compared([one[name] for one in parts])
    return total.tolist()


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """(advantage - mean) / std, over all responses where `mask` is 1, each counted once; 0 for all
    if they are equal.

    Args:
        advantages, mask: [responses].
    """
    values = advantages[mask > 0]
    if not len(values) or values.min() == values.max():
        return torch.zeros_like(advantages)
    return (advantages - values.mean()) / values.std()
