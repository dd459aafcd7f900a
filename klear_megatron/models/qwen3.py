"""Qwen3, dense: QK norm, grouped-query attention, SwiGLU, tied or untied embeddings, any RoPE."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from klear_megatron.errors import UserError
from klear_megatron.models.architecture import Weight, register_architecture, vocabulary_layout
from klear_megatron.models.layouts import QKV, GatedMLP, Replicated, Row


class Qwen3:
    """`Qwen3ForCausalLM`."""

    def transformer_config(self, hf: PretrainedConfig) -> dict[str, Any]:
        for field in ("attention_bias", "use_sliding_window"):
            if getattr(hf, field, False):
                raise UserError(f"{hf.name_or_path}: Qwen3 with {field}=true is not supported")
        return {
            "num_layers": hf.num_hidden_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": hf.intermediate_size,
            "num_attention_heads": hf.num_attention_heads,
            "num_query_groups": hf.num_key_value_heads,
            "kv_channels": hf.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf.rms_norm_eps,
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "add_qkv_bias": False,
        }

    def rotary(self, hf: PretrainedConfig) -> tuple[Tensor, float]:
        rotary = Qwen3RotaryEmbedding(cast(Qwen3Config, hf))
        return rotary.inv_freq, rotary.attention_scaling

    def weights(self, hf: PretrainedConfig, padded_vocab_size: int) -> Iterator[Weight]:
        hidden, ffn, head = hf.hidden_size, hf.intermediate_size, hf.head_dim
        q_rows, kv_rows = hf.num_attention_heads * head, hf.num_key_value_heads * head
        vocabulary = vocabulary_layout(hf, padded_vocab_size)
        qkv = QKV(
            groups=hf.num_key_value_heads,
            heads_per_group=hf.num_attention_heads // hf.num_key_value_heads,
        )

        yield Weight(
            "embedding.word_embeddings.weight",
            {"model.embed_tokens.weight": (hf.vocab_size, hidden)},
            vocabulary,
        )
        for i in range(hf.num_hidden_layers):
            megatron, source = f"decoder.layers.{i}.", f"model.layers.{i}."
            yield Weight(
                megatron + "self_attention.linear_qkv.layer_norm_weight",
                {source + "input_layernorm.weight": (hidden,)},
                Replicated(),
            )
            yield Weight(
                megatron + "self_attention.linear_qkv.weight",
                {
                    source + "self_attn.q_proj.weight": (q_rows, hidden),
                    source + "self_attn.k_proj.weight": (kv_rows, hidden),
                    source + "self_attn.v_proj.weight": (kv_rows, hidden),
                },
                qkv,
            )
            for norm in ("q", "k"):
                yield Weight(
                    megatron + f"self_attention.{norm}_layernorm.weight",
                    {source + f"self_attn.{norm}_norm.weight": (head,)},
                    Replicated(),
                )
            yield Weight(
                megatron + "self_attention.linear_proj.weight",
                {source + "self_attn.o_proj.weight": (hidden, q_rows)},
                Row,
            )
            yield Weight(
                megatron + "mlp.linear_fc1.layer_norm_weight",
                {source + "post_attention_layernorm.weight": (hidden,)},
                Replicated(),
            )
            yield Weight(
                megatron + "mlp.linear_fc1.weight",
                {
                    source + "mlp.gate_proj.weight": (ffn, hidden),
                    source + "mlp.up_proj.weight": (ffn, hidden),
                },
                GatedMLP(),
            )
            yield Weight(
                megatron + "mlp.linear_fc2.weight",
                {source + "mlp.down_proj.weight": (hidden, ffn)},
                Row,
            )
        yield Weight(
            "decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}, Replicated()
        )
        if not hf.tie_word_embeddings:
            yield Weight(
                "output_layer.weight", {"lm_head.weight": (hf.vocab_size, hidden)}, vocabulary
            )


register_architecture("Qwen3ForCausalLM", Qwen3())
