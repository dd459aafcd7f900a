"""Losses: pure functions on per-token tensors, and their sums over a mini-batch."""

from klear_megatron.losses.advantages import group_advantages
from klear_megatron.losses.cispo import cispo
from klear_megatron.losses.config import LossConfig
from klear_megatron.losses.gppo import gppo
from klear_megatron.losses.objective import Objective, PolicyObjective, Result, SFTObjective
from klear_megatron.losses.ppo_clip import ppo_clip

__all__ = [
    "LossConfig",
    "Objective",
    "PolicyObjective",
    "Result",
    "SFTObjective",
    "cispo",
    "gppo",
    "group_advantages",
    "ppo_clip",
]
