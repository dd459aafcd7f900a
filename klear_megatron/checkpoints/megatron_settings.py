"""A model's Hugging Face config from the settings that Megatron-LM and Megatron-Bridge store, and
those settings from the config.

The two projects name the same things differently: `num_experts` and `swiglu` are arguments of
Megatron-LM, `num_moe_experts` and `gated_linear_unit` fields of Megatron-Core and Bridge.
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from klear_megatron.errors import UserError
from klear_megatron.models import get_architecture

_BRIDGE_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "swiglu": "gated_linear_unit",
    "use_rope_scaling": "rope_scaling",
}
"""Megatron-LM's argument -> Bridge's field, where only the name differs."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "gated_linear_unit": (True,),
    "normalization": ("RMSNorm",),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "multi_latent_attention": (False, None),
    "moe_router_pre_softmax": (False, None),
    "moe_router_score_function": ("softmax", None),
    "moe_shared_expert_intermediate_size": (None, 0),
    "mtp_num_layers": (None, 0),
}
"""Settings whose other values make another kind of model; missing ones are taken as these."""

_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's `rope_scaling` fixes besides the factor."""


def bridge_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of either project under Bridge's names, each present and in one form."""
    found = {_BRIDGE_NAMES.get(name, name): value for name, value in settings.items()}
    if "untie_embeddings_and_output_weights" in found:
        tied = not found["untie_embeddings_and_output_weights"]
        found["share_embeddings_and_output_weights"] = tied
    heads = found.get("num_attention_heads")
    if not found.get("num_query_groups") or found.get("group_query_attention") is False:
        found["num_query_groups"] = heads
    if not found.get("kv_channels") and heads:
        found["kv_channels"] = found["hidden_size"] // heads
    if not found.get("num_moe_experts"):
        found["num_moe_experts"] = None
    return found


def derived_config(
    settings: Mapping[str, Any], vocab_size: int, *, source: object
) -> PretrainedConfig:
    """The Hugging Face config of the model that the settings describe.

    Args:
        vocab_size: the number of rows in the embedding, where the settings do not say how many of
            them are not padding.
        source: the checkpoint, for messages.

    Raises:
        UserError: a setting is missing, or of no architecture here.
    """
    found = bridge_settings(settings)
    wrong = [f"{k} {found[k]!r}" for k, v in _MUST_BE.items() if found.get(k, v[0]) not in v]
    freq = found.get("moe_layer_freq", 1)
    if freq != 1 and set(freq if isinstance(freq, list) else [0]) != {1}:
        wrong.append(f"moe_layer_freq {freq}")
    if wrong:
        raise UserError(
            f"{source}: no config can be derived of {', '.join(wrong)}; give the model's with --hf"
        )
    name, model_type = _architecture(found)
    try:
        fields = _fields(found, vocab_size)
    except KeyError as error:
        raise UserError(
            f"{source}: its settings lack {error.args[0]}; give the model's config with --hf"
        ) from error
    config = AutoConfig.for_model(model_type, **fields)
    config.architectures = [name]
    return config


def _architecture(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["num_moe_experts"]:
        return "Qwen3MoeForCausalLM", "qwen3_moe"
    if found.get("qk_layernorm"):
        return "Qwen3ForCausalLM", "qwen3"
    if found.get("add_qkv_bias"):
        return "Qwen2ForCausalLM", "qwen2"
    return "LlamaForCausalLM", "llama"


def _fields(found: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The config's fields."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(found["rotary_base"])}
    if found.get("rope_scaling"):
        factor = float(found.get("rope_scaling_factor") or 8.0)
        rope |= {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
    fields = {
        "hidden_size": found["hidden_size"],
        "intermediate_size": found["ffn_hidden_size"],
        "num_hidden_layers": found["num_layers"],
        "num_attention_heads": found["num_attention_heads"],
        "num_key_value_heads": found["num_query_groups"],
        "head_dim": found["kv_channels"],
        "rms_norm_eps": found["layernorm_epsilon"],
        "hidden_act": "silu",
        "vocab_size": found.get("vocab_size") or vocab_size,
        "tie_word_embeddings": found["share_embeddings_and_output_weights"],
        "rope_parameters": rope,
        "max_position_embeddings": found.get("max_position_embeddings") or found["seq_length"],
    }
    if found["num_moe_experts"]:
        fields |= {
            "num_experts": found["num_moe_experts"],
            "moe_intermediate_size": found["moe_ffn_hidden_size"] or found["ffn_hidden_size"],
            "num_experts_per_tok": found["moe_router_topk"],
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        }
    return fields


def check_settings(settings: Mapping[str, Any], hf: PretrainedConfig, *, source: object) -> None:
    """Compares what a checkpoint says of its model with the config that was given for it.

    Raises:
        UserError: they differ; lists every difference.
    """
    found = bridge_settings(settings)
    differing = [
        f"{name} is {found[name]!r} in the checkpoint, {value!r} by the config"
        for name, value in _described(hf).items()
        if found.get(name) is not None and not _same(found[name], value)
    ]
    if differing:
        raise UserError(
            f"{source}: {hf.name_or_path}/config.json is of another model\n  "
            + "\n  ".join(differing)
        )


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _described(hf: PretrainedConfig) -> dict[str, Any]:
    """What can be compared of a config, under Bridge's names."""
    fields = get_architecture(hf).transformer_config(hf)
    return {
        **{k: v for k, v in fields.items() if k not in ("activation_func", "moe_router_dtype")},
        "qk_layernorm": fields.get("qk_layernorm", False),
        "add_qkv_bias": fields.get("add_qkv_bias", False),
        "num_moe_experts": fields.get("num_moe_experts"),
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
        "rotary_base": hf.rope_parameters["rope_theta"],
    }
