"""The distributed optimizer's state in a checkpoint: each rank writes and reads its own shard.

A data-parallel rank owns a flat range of each parameter. On disk the state has the parameters'
shapes and the names of Megatron-Core's `fully_reshardable` format, so any layout can load it, and
so can Megatron-LM. To write that format, Megatron-Core gathers the whole state on every rank. But a
flat range of a tensor is also a few hyper-rectangles of it, and those a rank can write on its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """The part of one parameter's state that this rank owns."""

    optimizer: DistributedOptimizer
    parameter: Tensor
    start: int
    """Where the part begins in the flattened local parameter."""
    state: dict[str, Tensor]
    """The optimizer's own tensors where it hands those out, copies where it does not. The tensors
    named in `_STATES` are flat and of one length; torch's Adam also has a scalar `step`."""


def owned_shards(optimizer: ChainedOptimizer) -> list[Shard]:
    """Every shard that this rank owns."""
    shards = []
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            start = part._get_model_param_range_map(parameter)["param"].start
            state = part._get_main_param_and_optimizer_states(parameter)
            shards.append(Shard(part, parameter, start, state))
    return shards


def sharded_tensors(shards: Sequence[Shard], model_state: dict[str, Any]) -> dict[str, Any]:
    """The shards' tensors in the form that Megatron saves, and loads in place.

    Args:
        model_state: the sharded state dict of the model. It gives each parameter's place in the
            whole model.
    """
    places = {
        id(value.data): value
        for value in nested_values(model_state)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    pieces = [
        piece
        for shard in shards
        for begin, whole in _whole_tensors(places[id(shard.parameter)])
        for piece in _pieces(shard, begin, whole)
    ]
    return {str(number): piece for number, piece in enumerate(pieces)}


@torch.no_grad()
def adopt_loaded(shards: Sequence[Shard]) -> None:
    """Hands loaded tensors back to the optimizer, which may have given out copies."""
    for shard in shards:
        shard.optimizer._set_main_param_and_optimizer_states(shard.parameter, shard.state)
    for part in {id(shard.optimizer): shard.optimizer for shard in shards}.values():
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()


def optimizer_settings(optimizer: ChainedOptimizer) -> dict[Any, Any]:
    """What the optimizer keeps besides tensors, in the form of a Megatron-Core checkpoint."""
    optimizer._synchronize_steps()
    parts = [
        {**part.state_dict(), "param_state_sharding_type": "fully_reshardable"}
        for part in optimizer.chained_optimizers
    ]
    return parts[0] if len(parts) == 1 else dict(enumerate(parts))


def load_settings(optimizer: ChainedOptimizer, saved: dict[Any, Any]) -> None:
    """Restores `optimizer_settings` from any layout, but for those of this run's config, and
    allocates the tensors to load into."""
    # With expert parallelism there are two optimizers, numbered 0 and 1; without it there is one.
    # Settings such as the step are the same for expert parameters and for the others.
    groups = [
        {**group, "is_expert_parallel": expert}
        for part in (saved, *(saved[number] for number in (0, 1) if number in saved))
        if "optimizer" in part
        for group in part["optimizer"]["param_groups"]
        for expert in (False, True)
    ]
    for part in optimizer.chained_optimizers:
        config = part.config
        own = {
            "max_lr": config.lr,
            "min_lr": config.min_lr,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_eps,
        }
        # Set before and not after: Megatron-Core 0.19 finds a group by its learning rates, too.
        part.load_state_dict({"optimizer": {"param_groups": [{**g, **own} for g in groups]}})
        # Megatron-Core gives all parameters one tensor as their step. Torch's Adam adds 1 to it for
        # each parameter, so each needs its own.
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def boxes(
    start: int, stop: int, shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the elements [start, stop) of a row-major tensor into hyper-rectangles.

    Yields:
        offsets and sizes of each, in the order of the elements.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        parts = [(last, start, stop)]
    else:
        parts = [(first - 1, start, first * row), (last, last * row, stop)]
    head, *tail = [
        [
            ((index, *offsets), (1, *sizes))
            for offsets, sizes in boxes(begin - index * row, end - index * row, shape[1:])
        ]
        for index, begin, end in parts
    ]
    yield from head
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for part in tail:
        yield from part


def _whole_tensors(
    place: ShardedTensor | ShardedTensorFactory,
) -> Iterator[tuple[int, ShardedTensor]]:
    """The stored tensors that make up a local parameter, and the element at which each begins."""
    if isinstance(place, ShardedTensor):
        yield 0, place
        return
    # Gate and up projections are one parameter in memory and two on disk. Split a tensor without
    # data to learn where they lie: FP8 parameters cannot be split themselves.
    blank = torch.empty(place.data.shape, device="meta")
    for whole in nested_values(replace(place, data=blank).build()):
        assert whole.data.is_contiguous(), f"{whole.key}: not cut along its first dimension"
        yield whole.data.storage_offset(), whole


def _pieces(shard: Shard, begin: int, whole: ShardedTensor) -> Iterator[ShardedTensor]:
    """The shard's part of a stored tensor that begins at element `begin` of the parameter."""
    stacked = whole.prepend_axis_num
    length = len(shard.state["param"])
    start = max(shard.start, begin)
    stop = min(shard.start + length, begin + math.prod(whole.local_shape))
    for offsets, sizes in boxes(start - begin, stop - begin, whole.local_shape):
        here, start = start - shard.start, start + math.prod(sizes)
        corner = (a + b for a, b in zip(whole.global_offset[stacked:], offsets, strict=True))
        offset = (*whole.global_offset[:stacked], *corner)
        shape = (1,) * stacked + sizes
        for name in _STATES:
            flat = shard.state[name].detach()
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{whole.key}",
                data=flat[here : start - shard.start].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=whole.global_shape,
                global_offset=offset,
                axis_fragmentations=None,
                # Unlike the parameter, this box exists on one data-parallel rank only.
                replica_id=(*whole.replica_id[:2], 0),
                allow_shape_mismatch=whole.allow_shape_mismatch,
            )
