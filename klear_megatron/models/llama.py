"""Llama 2 and 3.x: no biases, no QK norm; Llama 3.1 and later scale RoPE by wavelength."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from klear_megatron.models import llama_family
from klear_megatron.models.architecture import Weight, register_architecture

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class Llama:
    """`LlamaForCausalLM`."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        return llama_family.transformer_config(hf, refuse=("attention_bias", "mlp_bias"))

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        return llama_family.rotary(hf)

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        return llama_family.weights(hf, padded_vocab_size)


register_architecture("LlamaForCausalLM", Llama())
