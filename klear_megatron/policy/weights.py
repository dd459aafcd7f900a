"""Weights in and out of a distributed model, by the architecture's table."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from klear_megatron import platform
from klear_megatron.models import Weight
from klear_megatron.models.hf_checkpoint import HFCheckpoint
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.models.spec import TORCH_NAMES


def local_parameters(chunks: Sequence[LanguageModel]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their names in the table, with global layer numbers."""
    parameters = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                local, inner = name.removeprefix("decoder.layers.").split(".", 1)
                layer = chunk.decoder.layers[int(local)].layer_number - 1
                name = f"decoder.layers.{layer}.{TORCH_NAMES.get(inner, inner)}"
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                # The last pipeline stage's copy of tied embeddings.
                name = "embedding.word_embeddings.weight"
            parameters[name] = parameter
    return parameters


@torch.no_grad()
def load_hf_weights(chunks: Sequence[LanguageModel], table: Sequence[Weight], path: Path) -> None:
    """Fills this rank's parameters from a Hugging Face checkpoint.

    Raises:
        UserError: the checkpoint does not hold exactly the tensors of the table.
    """
    checkpoint = HFCheckpoint(path)
    checkpoint.check(table)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    parameters = local_parameters(chunks)
    for row in table:
        if (parameter := parameters.pop(row.name, None)) is not None:
            full = row.layout.merge([checkpoint.tensor(name) for name in row.sources])
            parameter.copy_(row.layout.shard(full, rank, size))
    if parameters:
        raise RuntimeError(f"the table has no row for {', '.join(parameters)}")


def gather_hf_tensors(
    shards: dict[str, Tensor], table: Sequence[Weight]
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, one at a time, on global rank 0.

    Collective: every rank must iterate to the end; only rank 0 is given anything. Whatever the
    layout, each shard is sent point to point by the lowest rank that holds it.

    Args:
        shards: this rank's shard of each row it holds, by the table's names.
    """
    rank, size = dist.get_rank(), parallel_state.get_tensor_model_parallel_world_size()
    mine = (
        parallel_state.get_tensor_model_parallel_rank(),
        {name: shard.dtype for name, shard in shards.items()},
    )
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    owners: dict[str, dict[int, int]] = {}
    for owner, (shard_index, dtypes) in enumerate(everyone):
        for name in dtypes:
            owners.setdefault(name, {}).setdefault(shard_index, owner)

    for row in table:
        owner_of = [owner for _, owner in sorted(owners[row.name].items())]
        if rank == 0:
            shape = _shard_shape(row, size)
            pieces = []
            for owner in owner_of:
                if owner == 0:
                    pieces.append(shards[row.name].detach())
                else:
                    dtype = everyone[owner][1][row.name]
                    pieces.append(torch.empty(shape, dtype=dtype, device=platform.device()))
                    dist.recv(pieces[-1], src=owner)
            yield from zip(row.sources, row.layout.split(row.layout.unshard(pieces)), strict=True)
        elif rank in owner_of:
            dist.send(shards[row.name].detach().contiguous(), dst=0)


def _shard_shape(row: Weight, size: int) -> torch.Size:
    parts = [torch.empty(shape, device="meta") for shape in row.sources.values()]
    return row.layout.shard(row.layout.merge(parts), 0, size).shape
