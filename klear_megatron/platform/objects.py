"""Objects that ranks give to each other, through the memory of their hosts.

Between GPUs, torch would send them through the GPUs' memory, padded to the largest rank's.
"""

import functools
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

# Ranks wait here while others generate, evaluate or start servers, which takes as long as it takes
# and has time limits of its own.
_LONGEST_WAIT = timedelta(days=1)


def _group() -> dist.ProcessGroup:
    return _group_beside(dist.group.WORLD)


@functools.cache
def _group_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Of the same ranks; one for each world that a process has been in."""
    return dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def connect() -> None:
    """Collective. Makes the connections between the ranks, which the first use would make else.

    A rank that waits for one that ends learns of it by them; while they are made, it does not.
    """
    _group()


def all_gather(value: T) -> list[T]:
    """Collective. Every rank's value, by rank."""
    everyone: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=_group())
    return everyone


def broadcast(value: T, source: int = 0) -> T:
    """Collective. The value of the rank `source`; the others' is not looked at."""
    holder = [value]
    dist.broadcast_object_list(holder, src=source, group=_group())
    return holder[0]
