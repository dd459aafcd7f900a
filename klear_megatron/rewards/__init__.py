"""Grading responses."""

from klear_megatron.rewards.code import code_reward
from klear_megatron.rewards.config import (
    CodeRewardConfig,
    CustomRewardConfig,
    MathRewardConfig,
    RewardConfig,
)
from klear_megatron.rewards.graders import (
    check_data_sources,
    check_functions,
    check_ground_truths,
)
from klear_megatron.rewards.math import math_reward
from klear_megatron.rewards.pool import RewardPool
from klear_megatron.rewards.reward import Job, Reward

__all__ = [
    "CodeRewardConfig",
    "CustomRewardConfig",
    "Job",
    "MathRewardConfig",
    "Reward",
    "RewardConfig",
    "RewardPool",
    "check_data_sources",
    "check_functions",
    "check_ground_truths",
    "code_reward",
    "math_reward",
]
