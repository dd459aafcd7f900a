"""Exchanging Python objects between ranks, through host memory.

With NCCL, torch would send them through GPU memory, padded to the largest rank's size.
"""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from klear_megatron.errors import UserError

T = TypeVar("T")

# Ranks wait here while others generate, evaluate or start servers. Those have time limits of their
# own.
_LONGEST_WAIT = timedelta(days=1)


def host_group() -> dist.ProcessGroup:
    """Collective at its first call. A gloo group of all ranks."""
    return _group_beside(dist.group.WORLD)


@functools.cache
def _group_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of the same ranks; one for each world that a process has been in."""
    return dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def connect() -> None:
    """Collective. Opens the connections between ranks now instead of on first use.

    Over an open connection a waiting rank notices that another has ended; while connecting it does
    not.
    """
    host_group()


def all_gather(value: T) -> list[T]:
    """Collective. Every rank's value, by rank."""
    everyone: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value, group=host_group())
    return everyone


def broadcast(value: T, source: int = 0) -> T:
    """Collective. The value of rank `source`; the values of other ranks are ignored."""
    holder = [value]
    dist.broadcast_object_list(holder, src=source, group=host_group())
    return holder[0]


def failures(action: Callable[[], object]) -> list[UserError]:
    """Collective. Runs `action`.

    Returns:
        The UserErrors that it raised on any rank, by rank.
    """
    failure: UserError | None = None
    try:
        action()
    except UserError as error:
        error.rank = dist.get_rank()
        failure = error
    return [found for found in all_gather(failure) if found is not None]


def together(action: Callable[[], T]) -> T:
    """Collective. Returns what `action` returns on this rank.

    Raises:
        UserError: on all ranks, if `action` raises one on any of them.
    """
    results: list[T] = []
    for failure in failures(lambda: results.append(action())):
        raise failure
    return results[0]
