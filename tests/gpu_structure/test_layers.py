"""Transformer Engine's layers hold the parameters of our table, at every rank of every layout."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from klear_megatron.models import Weight, padded_vocab_size
from klear_megatron.models.language_model import LanguageModel
from klear_megatron.policy.weights import _shard_position, local_parameters
from tests.gpu_structure.stage import (
    CONFIGS,
    RECIPES,
    gpu_chunks,
    policy_config,
    recipe_name,
    standing_at,
    torch_chunks,
    write_config,
)

_TP, _PP, _EP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert"))
DENSE: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (4, {_TP: 4}),
    (4, {_TP: 2, _PP: 2}),
    (2, {_PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    (3, {_PP: 3, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}),
    (4, {_TP: 2, "context_parallel_size": 2}),
]
"""(ranks, sizes)"""
EXPERTS: list[tuple[int, dict[str, int]]] = [
    (4, {_EP: 4}),
    (8, {_TP: 2, _PP: 2, _EP: 2}),
    (4, {_TP: 2, _EP: 4, "expert_tensor_parallel_size": 1}),
]


def _layouts(name: str) -> list[tuple[int, dict[str, int]]]:
    return DENSE + (EXPERTS if "Moe" in name else [])


def _shapes_here(table: Sequence[Weight], held: set[str]) -> dict[str, torch.Size]:
    """The shapes that rows of the table have on this rank."""
    shapes = {}
    for row in table:
        if row.name in held:
            parts = [torch.empty(shape, device="meta") for shape in row.sources.values()]
            shard = row.mapping.shard(row.mapping.merge(parts), *_shard_position(row))
            shapes[row.name] = shard.shape
    return shapes


def _stored(chunks: Sequence[LanguageModel]) -> set[tuple[Any, ...]]:
    """What a checkpoint gets from this rank: key, whole shape, and the place of this rank's part.
    Transformer Engine's FP8 state, which is no weight, is left out."""
    return {
        (part.key, part.global_shape, part.global_offset, part.local_shape)
        for chunk in chunks
        for value in nested_values(chunk.sharded_state_dict())
        for part in _parts(value)
    }


def _parts(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        blank: Tensor = torch.empty(value.data.shape, device="meta")
        value.data = blank
        yield from nested_values(value.build())


@pytest.mark.parametrize(("fp8", "gather"), RECIPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_the_tables_and_checkpoints_those_of_plain_torch(
    name, fp8, gather, tmp_path, proven
):
    folder = write_config(name, tmp_path)
    for world_size, sizes in _layouts(name):
        config = policy_config(tmp_path, fp8=fp8, fp8_param_gather=gather, parallel=sizes)
        tp = config.parallel.tensor_model_parallel_size
        table = folder.table(padded_vocab_size(folder.config.vocab_size, tp))
        somewhere: set[str] = set()
        for rank in range(world_size):
            with standing_at(config.parallel, rank, world_size):
                chunks = gpu_chunks(config, folder)
                held = {n: p.shape for n, p in local_parameters(chunks).items()}
                where = f"{sizes}, rank {rank}"
                assert held == _shapes_here(table, set(held)), where
                assert _stored(chunks) == _stored(torch_chunks(config, folder)), where
            somewhere |= held.keys()
        assert somewhere == {row.name for row in table}, sizes
    ranks = sum(world_size for world_size, _ in _layouts(name))
    proven(
        f"{name}: names, shapes and keys in checkpoints, at {ranks} ranks of "
        f"{len(_layouts(name))} layouts",
        recipe_name(fp8, gather),
    )
