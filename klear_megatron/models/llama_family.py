"""What the decoders of Llama's family share: settings, rotary positions, and rows of weights.

Each architecture's file combines these and adds what is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from klear_megatron.errors import UserError
from klear_megatron.models.architecture import Weight
from klear_megatron.models.mapping import QKV, GatedMLP, Replicated, Row, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the current sequence."""

FeedForward = Callable[["PretrainedConfig", str, str], Iterator[Weight]]
"""(config, Megatron's prefix, Hugging Face's prefix) -> rows of one layer's feed-forward part."""


def transformer_config(hf: PretrainedConfig, *, refuse: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that the family derives from the same config fields.

    Args:
        refuse: fields of `hf` that change the model in ways this package does not implement.

    Raises:
        UserError: one of those is set, or the activation is not SiLU.
    """
    for field in refuse:
        if getattr(hf, field, False):
            value = getattr(hf, field)
            raise UserError(f"{hf.name_or_path}/config.json: {field}={value} is not supported")
    if hf.hidden_act != "silu":
        raise UserError(
            f"{hf.name_or_path}/config.json: hidden_act={hf.hidden_act!r} is not supported, only "
            "'silu'"
        )
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": head_dim(hf),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": hf.hidden_act,
        "add_bias_linear": False,
    }


def head_dim(hf: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rotary(hf: PretrainedConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32, and the factor on cos and sin.

    Raises:
        UserError: a kind of RoPE scaling that is not supported.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = hf.rope_parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        raise UserError(
            f"{hf.name_or_path}/config.json: rope_type {kind!r} is not supported; supported: "
            f"{', '.join(_ROPE_TYPES)}"
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim(hf), 2, dtype=torch.float) / head_dim(hf)
        return 1.0 / hf.rope_parameters["rope_theta"] ** exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))


def gated_mlp(hf: PretrainedConfig, megatron: str, source: str) -> Iterator[Weight]:
    """gate, up and down projections of a dense layer."""
    yield from gated_mlp_rows(hf.hidden_size, hf.intermediate_size, megatron, source)


def gated_mlp_rows(
    hidden: int, ffn: int, megatron: str, source: str, **options: Any
) -> Iterator[Weight]:
    """gate, up and down projections of width `ffn`, of a layer or an expert.

    Args:
        options: further fields of `Weight`.
    """
    yield Weight(
        megatron + "linear_fc1.weight",
        {source + "gate_proj.weight": (ffn, hidden), source + "up_proj.weight": (ffn, hidden)},
        GatedMLP(),
        **options,
    )
    yield Weight(
        megatron + "linear_fc2.weight",
        {source + "down_proj.weight": (hidden, ffn)},
        Row,
        **options,
    )


def weights(
    hf: PretrainedConfig,
    padded_vocab_size: int,
    *,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    feed_forward: FeedForward = gated_mlp,
    feed_forward_norm: str = "mlp.linear_fc1.layer_norm_weight",
) -> Iterator[Weight]:
    """The table: embedding, each layer's attention and feed-forward, final norm, output."""
    hidden = hf.hidden_size
    vocabulary = Vocabulary(size=hf.vocab_size, padded_size=padded_vocab_size)
    yield Weight(
        "embedding.word_embeddings.weight",
        {"model.embed_tokens.weight": (hf.vocab_size, hidden)},
        vocabulary,
    )
    for i in range(hf.num_hidden_layers):
        megatron, source = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield from _attention(hf, megatron, source, qk_norm=qk_norm, qkv_bias=qkv_bias)
        yield Weight(
            megatron + feed_forward_norm,
            {source + "post_attention_layernorm.weight": (hidden,)},
            Replicated(),
        )
        yield from feed_forward(hf, megatron + "mlp.", source + "mlp.")
    yield Weight("decoder.final_layernorm.weight", {"model.norm.weight": (hidden,)}, Replicated())
    if not hf.tie_word_embeddings:
        yield Weight("output_layer.weight", {"lm_head.weight": (hf.vocab_size, hidden)}, vocabulary)


def _attention(
    hf: PretrainedConfig, megatron: str, source: str, *, qk_norm: bool, qkv_bias: bool
) -> Iterator[Weight]:
    """Rows of one layer's attention, and of the norm before it."""
    hidden, head, groups = hf.hidden_size, head_dim(hf), hf.num_key_value_heads
    qkv = QKV(groups=groups, heads_per_group=hf.num_attention_heads // groups)
    rows = {"q": hf.num_attention_heads * head, "k": groups * head, "v": groups * head}
    yield Weight(
        megatron + "self_attention.linear_qkv.layer_norm_weight",
        {source + "input_layernorm.weight": (hidden,)},
        Replicated(),
    )
    yield Weight(
        megatron + "self_attention.linear_qkv.weight",
        {source + f"self_attn.{x}_proj.weight": (n, hidden) for x, n in rows.items()},
        qkv,
    )
    if qkv_bias:
        yield Weight(
            megatron + "self_attention.linear_qkv.bias",
            {source + f"self_attn.{x}_proj.bias": (n,) for x, n in rows.items()},
            qkv,
        )
    if qk_norm:
        for x in ("q", "k"):
            yield Weight(
                megatron + f"self_attention.{x}_layernorm.weight",
                {source + f"self_attn.{x}_norm.weight": (head,)},
                Replicated(),
            )
    yield Weight(
        megatron + "self_attention.linear_proj.weight",
        {source + "self_attn.o_proj.weight": (hidden, rows["q"])},
        Row,
    )
