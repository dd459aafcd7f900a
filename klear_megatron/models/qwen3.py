"""Qwen3, dense: QK norm, tied or untied embeddings, any RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from klear_megatron.models import llama_family
from klear_megatron.models.architecture import Weight, register_architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class Qwen3:
    """`Qwen3ForCausalLM`."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        common = llama_family.transformer_config(
            hf, refuse=("attention_bias", "use_sliding_window")
        )
        return {**common, "qk_layernorm": True}

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        return llama_family.rotary(hf)

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        return llama_family.weights(hf, padded_vocab_size, qk_norm=True)


register_architecture("Qwen3ForCausalLM", Qwen3())
