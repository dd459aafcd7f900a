"""Exchanging tensors and numbers between ranks, through host memory.

For values of any other kind, see `objects`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.platform import objects


@dataclass(frozen=True)
class PlacedTensor:
    """What a tensor looks like, and the rank that has it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rank: int


def broadcast(pieces: Iterable[tuple[Tensor, int]]) -> None:
    """Collective. Fills each tensor with that of its source rank, several at a time.

    Args:
        pieces: contiguous CPU tensors, of the same shapes and dtypes on every rank, with the rank
            that each comes from.
    """
    group = objects.host_group()
    sent = [
        dist.broadcast(tensor, source, group=group, async_op=True)
        for tensor, source in pieces
        if tensor.numel()
    ]
    for one in sent:
        assert one is not None
        one.wait()


def add_up(tensor: Tensor) -> None:
    """Collective. Replaces a CPU tensor by its sum over all ranks."""
    dist.all_reduce(tensor, group=objects.host_group())


def sums_by_name(values: Mapping[str, float]) -> dict[str, float]:
    """Collective. The sum of each name's values over the ranks that have the name."""
    names = sorted(set().union(*objects.all_gather(set(values))))
    sums = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64)
    add_up(sums)
    return dict(zip(names, sums.tolist(), strict=True))
