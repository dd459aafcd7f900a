"""Architectures: Hugging Face config -> Megatron model, and the table of their weights."""

from klear_megatron.models import llama as llama
from klear_megatron.models import qwen2 as qwen2
from klear_megatron.models import qwen3 as qwen3
from klear_megatron.models import qwen3_moe as qwen3_moe
from klear_megatron.models.architecture import (
    Architecture,
    Weight,
    get_architecture,
    padded_vocab_size,
    register_architecture,
)

__all__ = [
    "Architecture",
    "Weight",
    "get_architecture",
    "padded_vocab_size",
    "register_architecture",
]
