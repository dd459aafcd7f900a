"""Klear-Reasoner training on Megatron-Core: long-CoT SFT, then math RL, then code RL with GPPO."""

__version__ = "0.1.0"
