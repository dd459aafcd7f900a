"""Layer specs: which module computes what, in Transformer Engine or in plain torch.

The torch spec takes Megatron-Core's local spec and supplies the two modules it lacks:
an RMSNorm that supports sequence parallelism, and attention over packed sequences. Both specs use
our router.
"""

import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from klear_megatron.models.attention import PackedAttention
from klear_megatron.models.router import Router


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32, in the input's dtype."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of marked weights over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of this pipeline stage's transformer block."""
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if config.num_moe_experts:
            _experts(spec).router = Router
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if config.num_moe_experts:
        _experts(spec).router = Router
        # Transformer Engine does not fuse this norm with the router, so it keeps its plain name.
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _experts(layer: ModuleSpec) -> Any:
    """The submodules of a layer's mixture of experts: Megatron-Core's MoESubmodules."""
    mlp = layer.submodules.mlp
    # A ModuleSpec in Megatron-Core 0.16, a partial of the module's class from 0.17 on.
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
