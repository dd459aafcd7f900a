"""The sizes of a model, from its architecture's table of weights; no weights are read."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from klear_megatron.checkpoints.hf_config import read_sizes
from klear_megatron.checkpoints.hub import local_model
from klear_megatron.models import get_architecture, padded_vocab_size
from klear_megatron.models.architecture import Weight
from klear_megatron.models.mapping import ParamMapping

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ORDER_IN_A_LAYER = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
"""Megatron's order of a layer's first parameters; the others keep that of the table."""


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter, whole."""

    numel: int
    cut: bool
    """Whether tensor-parallel ranks share it; otherwise each has a copy."""
    expert: int | None = None
    """The number of the expert that it belongs to."""
    layer: bool = True
    """Whether it is a transformer layer's; embeddings, the last norm and the output are not."""
    matrix: bool = True
    """Whether it multiplies activations: neither a norm nor a bias."""


class PlannedModel:
    """What planning knows of a model.

    Args:
        config: the fields of a Hugging Face config, as attributes.

    Raises:
        UserError: an unknown architecture.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._architecture = get_architecture(self.config)
        fields = self._architecture.transformer_config(self.config)
        self.layers: int = fields["num_layers"]
        self.hidden: int = fields["hidden_size"]
        self.ffn: int = fields["ffn_hidden_size"]
        self.heads: int = fields["num_attention_heads"]
        self.groups: int = fields["num_query_groups"]
        self.head_dim: int = fields["kv_channels"]
        self.qk_norm: bool = fields.get("qk_layernorm", False)
        self.num_experts: int = fields.get("num_moe_experts") or 0
        self.expert_ffn: int = fields.get("moe_ffn_hidden_size") or 0
        self.experts_per_token: int = fields.get("moe_router_topk") or 0
        self.vocabulary: int = self.config.vocab_size
        self.positions: int = self.config.max_position_embeddings
        self.tied: bool = self.config.tie_word_embeddings

    @classmethod
    def read(cls, path: Path) -> "PlannedModel":
        """The model of a folder with a config.json, or of that name on the Hugging Face hub.

        Raises:
            UserError: no such folder or name, no config.json there, or an unknown architecture.
        """
        return cls(read_sizes(local_model(path, ["config.json"])))

    @cached_property
    def layer_parameters(self) -> list[list[Parameter]]:
        """Each layer's parameters, in Megatron's order."""
        rows = self._architecture.weights(self.config, self.vocabulary)
        layers = (row for row in rows if _LAYER.match(row.name))
        return [
            [_parameter(row) for row in sorted(of_one, key=_place)]
            for _, of_one in groupby(layers, key=lambda row: _LAYER.match(row.name).group(1))  # type: ignore[union-attr]
        ]

    @cached_property
    def layer_sums(self) -> list[tuple[int, int, int]]:
        """Each layer's elements: cut over tensor-parallel ranks, copied, and all experts'."""
        return [
            (
                sum(p.numel for p in layer if p.cut and p.expert is None),
                sum(p.numel for p in layer if not p.cut),
                sum(p.numel for p in layer if p.expert is not None),
            )
            for layer in self.layer_parameters
        ]

    @property
    def final_norm(self) -> Parameter:
        """The norm after the last layer."""
        return Parameter(self.hidden, cut=False, layer=False, matrix=False)

    def embedding(self, tensor_parallel: int) -> Parameter:
        """The embedding, and as large the output weight, with the vocabulary padded."""
        rows = padded_vocab_size(self.vocabulary, tensor_parallel)
        return Parameter(rows * self.hidden, cut=True, layer=False)

    def all_parameters(self) -> Iterator[Parameter]:
        """Every parameter once, without padding."""
        for layer in self.layer_parameters:
            yield from layer
        yield self.final_norm
        embedding = Parameter(self.vocabulary * self.hidden, cut=True, layer=False)
        yield from [embedding] * (1 if self.tied else 2)

    @cached_property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(parameter.numel for parameter in self.all_parameters())

    @cached_property
    def layer_matrices(self) -> tuple[int, int]:
        """Elements of one layer's matrices that work on a token: not experts', and experts'."""
        layer = self.layer_parameters[0]
        dense = sum(p.numel for p in layer if p.matrix and p.expert is None)
        experts = sum(p.numel for p in layer if p.matrix and p.expert is not None)
        return dense, experts * self.experts_per_token // max(self.num_experts, 1)

    def model_flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of one step's forward and backward: six per parameter that works on a token, and
        attention's, in which each token attends to those before it only (half the square)."""
        return 3 * self.forward_flops(sum(lengths), sum(length * length for length in lengths))

    def forward_flops(self, tokens: int, squares: int) -> float:
        """A third of `model_flops`, of sequences of so many tokens in all.

        Args:
            squares: the sum of their squared lengths.
        """
        dense, experts = self.layer_matrices
        linear = self.layers * (dense + experts) + self.vocabulary * self.hidden
        return 2 * tokens * linear + 2 * squares * self.layers * self.heads * self.head_dim


def _place(row: Weight) -> int:
    name = _LAYER.sub("", row.name)
    places = [i for i, start in enumerate(_ORDER_IN_A_LAYER) if name.startswith(start)]
    return places[0] if places else len(_ORDER_IN_A_LAYER)


def _parameter(row: Weight) -> Parameter:
    numel = sum(math.prod(shape) for shape in row.sources.values())
    expert = _EXPERT.search(row.name) if row.expert else None
    return Parameter(
        numel,
        cut=type(row.mapping) is not ParamMapping,
        expert=int(expert.group(1)) if expert else None,
        matrix=row.name.endswith("weight") and not _is_norm(row),
    )


def _is_norm(row: Weight) -> bool:
    return all(len(shape) == 1 for shape in row.sources.values())
