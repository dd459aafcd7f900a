"""Losses: pure functions on per-token tensors, and their sums over a mini-batch."""

from klear_megatron.losses.advantages import (
    AdvantageConfig,
    advantages_of,
    group_advantages,
    whitened,
)
from klear_megatron.losses.cispo import CISPOConfig, cispo
from klear_megatron.losses.clipped import clipped_tokens, clipping_metrics
from klear_megatron.losses.config import PolicyLossConfig
from klear_megatron.losses.corrections import drawn_tokens, trained_tokens
from klear_megatron.losses.dppo import DPPOConfig, dppo
from klear_megatron.losses.entropy_ratio import EntropyRatioOptions
from klear_megatron.losses.gmpo import GMPOConfig
from klear_megatron.losses.gppo import CEGPPOConfig, GPPOConfig, gppo
from klear_megatron.losses.gspo import GSPOConfig
from klear_megatron.losses.inputs import LossInputs, Sequences, TokenLoss
from klear_megatron.losses.kl import KLConfig, kl_to_reference
from klear_megatron.losses.objective import (
    Objective,
    PolicyObjective,
    Result,
    SFTObjective,
)
from klear_megatron.losses.ppo_clip import PPOClipConfig, ppo_clip
from klear_megatron.losses.ratio import ratio_of
from klear_megatron.losses.registry import CustomLossConfig, LossConfig
from klear_megatron.losses.reinforce import REINFORCEConfig, reinforce
from klear_megatron.losses.sapo import SAPOConfig, sapo
from klear_megatron.losses.surrogate import surrogate

__all__ = [
    "AdvantageConfig",
    "CEGPPOConfig",
    "CISPOConfig",
    "CustomLossConfig",
    "DPPOConfig",
    "EntropyRatioOptions",
    "GMPOConfig",
    "GPPOConfig",
    "GSPOConfig",
    "KLConfig",
    "LossConfig",
    "LossInputs",
    "Objective",
    "PPOClipConfig",
    "PolicyLossConfig",
    "PolicyObjective",
    "REINFORCEConfig",
    "Result",
    "SAPOConfig",
    "SFTObjective",
    "Sequences",
    "TokenLoss",
    "advantages_of",
    "cispo",
    "clipped_tokens",
    "clipping_metrics",
    "dppo",
    "drawn_tokens",
    "gppo",
    "group_advantages",
    "kl_to_reference",
    "ppo_clip",
    "ratio_of",
    "reinforce",
    "sapo",
    "surrogate",
    "trained_tokens",
    "whitened",
]
