"""Weights in and out of a distributed model, by the architecture's table."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from klear_megatron.checkpoints.hf_reader import HFCheckpoint
from klear_megatron.checkpoints.megatron_reader import MegatronCheckpoint
from klear_megatron.models import Weight
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.platform import objects
from klear_megatron.platform.device import this_device
from klear_megatron.platform.tensors import PlacedTensor

_TORCH_EXPERT = re.compile(
    r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<linear>linear_fc[12])\.weight"
)
_TRANSFORMER_ENGINE_EXPERT = re.compile(
    r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<number>\d+)"
)


def local_parameters(chunks: Sequence[LanguageModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the table, with global layers and experts."""
    parameters = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                local, inner = name.removeprefix("decoder.layers.").split(".", 1)
                layer = chunk.decoder.layers[int(local)].layer_number - 1
                name = f"decoder.layers.{layer}.{_table_name(inner, chunk.config)}"
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                # The last pipeline stage's copy of tied embeddings.
                name = "embedding.word_embeddings.weight"
            parameters[name] = parameter
    return parameters


def _table_name(inner: str, config: TransformerConfig) -> str:
    """A parameter's name within a layer -> what the table calls it, in either layer spec."""
    # The torch spec keeps apart what Transformer Engine fuses.
    if inner == "input_layernorm.weight":
        return "self_attention.linear_qkv.layer_norm_weight"
    if inner == "pre_mlp_layernorm.weight" and not config.num_moe_experts:
        return "mlp.linear_fc1.layer_norm_weight"
    if expert := _TORCH_EXPERT.fullmatch(inner) or _TRANSFORMER_ENGINE_EXPERT.fullmatch(inner):
        local_experts = config.num_moe_experts // config.expert_model_parallel_size
        first = parallel_state.get_expert_model_parallel_rank() * local_experts
        number = first + int(expert["number"])
        return f"mlp.experts.experts.{number}.{expert['linear']}.weight"
    return inner


def _shard_position(row: Weight) -> tuple[int, int]:
    """This rank's index among the ranks that share a row of the table, and their number."""
    if row.expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def plain(parameter: torch.nn.Parameter) -> Tensor:
    """The parameter as an ordinary tensor, dequantized if it is kept in FP8."""
    if is_float8tensor(parameter):
        return dequantize_fp8_tensor(parameter.detach())
    return parameter.data


def load_hf_weights(chunks: Sequence[LanguageModel], table: Sequence[Weight], path: Path) -> None:
    """Fills this rank's parameters from a Hugging Face checkpoint.

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of the table.
    """
    checkpoint = HFCheckpoint(path)
    checkpoint.check(table)
    _fill(chunks, table, lambda row: [checkpoint.tensor(name) for name in row.sources])


def load_megatron_weights(
    chunks: Sequence[LanguageModel],
    table: Sequence[Weight],
    checkpoint: MegatronCheckpoint,
    hf: PretrainedConfig,
) -> None:
    """Fills this rank's parameters from a Megatron checkpoint of any writer and any padding.

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of the table.
    """
    theirs = {row.name: row for row in checkpoint.table(hf)}
    _fill(
        chunks,
        table,
        lambda row: theirs[row.name].mapping.split(checkpoint.tensor(theirs[row.name])),
    )


@torch.no_grad()
def _fill(
    chunks: Sequence[LanguageModel],
    table: Sequence[Weight],
    sources: Callable[[Weight], list[Tensor]],
) -> None:
    """Fills this rank's parameters, from the Hugging Face tensors of each of their rows."""
    parameters = local_parameters(chunks)
    for row in table:
        if (parameter := parameters.pop(row.name, None)) is not None:
            shard = row.mapping.shard(row.mapping.merge(sources(row)), *_shard_position(row))
            parameter.copy_(shard)
            # Beside an FP8 weight, Transformer Engine keeps the value before rounding. The
            # optimizer starts from that.
            if (unrounded := getattr(parameter, "get_high_precision_init_val", None)) is not None:
                unrounded().copy_(shard)
    if parameters:
        raise RuntimeError(f"the table has no row for {', '.join(parameters)}")


class HFGather:
    """Puts full tensors together from their shards, under their Hugging Face names.

    Which rank holds what is exchanged once, here; making one is collective.

    Args:
        dtypes: the dtype of this rank's shard of each row of which it holds one, by the row's name.
        to_rank: the rank that gets everything. By default, each row goes to the lowest rank that
            holds its first shard, so that each pipeline stage and expert stage keeps its own.
    """

    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        table: Sequence[Weight],
        to_rank: int | None = None,
    ) -> None:
        self._table = table
        mine = {
            row.name: (_shard_position(row)[0], dtypes[row.name])
            for row in table
            if row.name in dtypes
        }
        self._dtypes: dict[str, torch.dtype] = {}
        owners: dict[str, dict[int, int]] = {}
        for rank, held in enumerate(objects.all_gather(mine)):
            for name, (shard_index, dtype) in held.items():
                owners.setdefault(name, {}).setdefault(shard_index, rank)
                self._dtypes[name] = dtype
        self._owners = {
            name: [owner for _, owner in sorted(ranks.items())] for name, ranks in owners.items()
        }
        self._to_rank = to_rank

    def _destination(self, row: Weight) -> int:
        return self._owners[row.name][0] if self._to_rank is None else self._to_rank

    @property
    def tensors(self) -> list[PlacedTensor]:
        """Everything that all ranks together get, in the order of each rank's stream."""
        return [
            PlacedTensor(name, self._dtypes[row.name], shape, self._destination(row))
            for row in self._table
            for name, shape in row.sources.items()
        ]

    def stream(self, shard: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """This rank's full tensors, one at a time. Collective: every rank must iterate to the end.

        The lowest rank that holds a shard sends it point to point, in every layout.

        Args:
            shard: this rank's shard of each row of which it holds one, by the row's name.
        """
        rank = dist.get_rank()
        for row in self._table:
            destination, owners = self._destination(row), self._owners[row.name]
            if rank == destination:
                pieces = [
                    shard(row.name).detach() if owner == rank else self._receive(row, owner)
                    for owner in owners
                ]
                full = pieces[0] if len(pieces) == 1 else row.mapping.unshard(pieces)
                yield from zip(row.sources, row.mapping.split(full), strict=True)
            elif rank in owners:
                dist.send(shard(row.name).detach().contiguous(), dst=destination)

    def _receive(self, row: Weight, owner: int) -> Tensor:
        piece = torch.empty(_shard_shape(row), dtype=self._dtypes[row.name], device=this_device())
        dist.recv(piece, src=owner)
        return piece


def _shard_shape(row: Weight) -> torch.Size:
    parts = [torch.empty(shape, device="meta") for shape in row.sources.values()]
    return row.mapping.shard(row.mapping.merge(parts), *_shard_position(row)).shape
