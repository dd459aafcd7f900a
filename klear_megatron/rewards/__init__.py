"""Grading responses."""

from klear_megatron.rewards.config import MathRewardConfig, RewardConfig
from klear_megatron.rewards.math import Reward, math_reward
from klear_megatron.rewards.pool import RewardPool, check_data_sources

__all__ = [
    "MathRewardConfig",
    "Reward",
    "RewardConfig",
    "RewardPool",
    "check_data_sources",
    "math_reward",
]
