"""Where each tensor of a model travels: in which bucket, from which rank. Pure."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from klear_megatron.platform.tensors import PlacedTensor

_ALIGNMENT = 16
"""Bytes; a tensor of any dtype can be viewed where it begins."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int
    """Bytes, as `begin`."""

    def of(self, data: Tensor) -> Tensor:
        """The tensor in the memory of its bucket, uint8."""
        return data[self.begin : self.begin + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Tensors that one rank sends in one broadcast."""

    rank: int
    places: list[Place]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.places[-1].begin + self.places[-1].size


def cut(tensors: Sequence[PlacedTensor], bucket_bytes: int) -> list[Bucket]:
    """Puts tensors into buckets of at most `bucket_bytes`; a larger tensor gets one of its own.

    A bucket comes before another if its last tensor does. Ranks put tensors together in the order
    of the list, and some wait for shards of others; in this order of the buckets, none waits for a
    rank that waits for it.
    """
    done: list[tuple[int, Bucket]] = []
    filling: dict[int, tuple[int, Bucket]] = {}
    for number, tensor in enumerate(tensors):
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        _, bucket = filling.get(tensor.rank, (0, None))
        begin = 0 if bucket is None else math.ceil(bucket.size / _ALIGNMENT) * _ALIGNMENT
        if bucket is None or begin + size > bucket_bytes:
            if bucket is not None:
                done.append(filling[tensor.rank])
            bucket, begin = Bucket(tensor.rank, []), 0
        bucket.places.append(Place(tensor.name, tensor.dtype, tensor.shape, begin, size))
        filling[tensor.rank] = number, bucket
    done += filling.values()
    return [bucket for _, bucket in sorted(done, key=lambda one: one[0])]


def describe(buckets: Sequence[Bucket], group_size: int) -> dict[str, Any]:
    """What the servers' `klear_weight_loader` must know before it can receive (JSON-like).

    Args:
        group_size: ranks of all servers, and the rank that sends.
    """
    return {
        "group_size": group_size,
        "senders": sorted({bucket.rank for bucket in buckets}),
        "buckets": [
            {
                "sender": bucket.rank,
                "size": bucket.size,
                "places": [
                    asdict(place) | {"dtype": str(place.dtype).removeprefix("torch.")}
                    for place in bucket.places
                ],
            }
            for bucket in buckets
        ],
    }
