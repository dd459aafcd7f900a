"""Qwen2 and Qwen2.5: biases on the QKV projections and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from klear_megatron.models import llama_family
from klear_megatron.models.architecture import Weight, register_architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class Qwen2:
    """`Qwen2ForCausalLM`."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        common = llama_family.transformer_config(hf, refuse=("use_sliding_window",))
        return {**common, "add_qkv_bias": True}

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        return llama_family.rotary(hf)

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        return llama_family.weights(hf, padded_vocab_size, qkv_bias=True)


register_architecture("Qwen2ForCausalLM", Qwen2())
