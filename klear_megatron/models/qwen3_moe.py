"""Qwen3-MoE: Qwen3's attention, and in every layer a router that picks k experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from klear_megatron.errors import UserError
from klear_megatron.models import llama_family
from klear_megatron.models.architecture import Weight, register_architecture
from klear_megatron.models.mapping import Replicated

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class Qwen3Moe:
    """`Qwen3MoeForCausalLM`."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        common = llama_family.transformer_config(
            hf, refuse=("attention_bias", "use_sliding_window", "mlp_only_layers")
        )
        if hf.decoder_sparse_step != 1 or not hf.norm_topk_prob:
            raise UserError(
                f"{hf.name_or_path}/config.json: decoder_sparse_step={hf.decoder_sparse_step} with "
                f"norm_topk_prob={hf.norm_topk_prob} is not supported, only 1 and true"
            )
        return {
            **common,
            "qk_layernorm": True,
            "num_moe_experts": hf.num_experts,
            "moe_ffn_hidden_size": hf.moe_intermediate_size,
            "moe_router_topk": hf.num_experts_per_tok,
            # The softmax over the chosen k is the softmax over all, normalised to a sum of one.
            "moe_router_pre_softmax": False,
            "moe_router_dtype": "fp32",
        }

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        return llama_family.rotary(hf)

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        return llama_family.weights(
            hf,
            padded_vocab_size,
            qk_norm=True,
            feed_forward=_experts,
            feed_forward_norm="pre_mlp_layernorm.weight",
        )


def _experts(hf: PretrainedConfig, megatron: str, source: str) -> Iterator[Weight]:
    hidden, ffn = hf.hidden_size, hf.moe_intermediate_size
    yield Weight(
        megatron + "router.weight",
        {source + "gate.weight": (hf.num_experts, hidden)},
        Replicated(),
    )
    for expert in range(hf.num_experts):
        yield from llama_family.gated_mlp_rows(
            hidden,
            ffn,
            megatron + f"experts.experts.{expert}.",
            source + f"experts.{expert}.",
            expert=True,
        )


register_architecture("Qwen3MoeForCausalLM", Qwen3Moe())
