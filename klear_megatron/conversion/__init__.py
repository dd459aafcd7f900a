"""Checkpoints from and to Hugging Face: streamed, checked, and never half there."""

from klear_megatron.conversion.convert import hf_to_megatron, megatron_to_hf

__all__ = ["hf_to_megatron", "megatron_to_hf"]
