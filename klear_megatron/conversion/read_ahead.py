"""Making the next items while the present one is used."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

_AHEAD = 4
"""Enough to read a large tensor while those beside it are small, and are soon used."""


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in the same order, made in a thread while those before them are in use.

    A few of them are in memory at a time. Reading, copying and checking tensors does not hold
    Python's lock, so that a second core does it.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = deque(thread.submit(next, iterator, end) for _ in range(_AHEAD))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, iterator, end))
                yield item  # type: ignore[misc]
                del item
        finally:
            thread.shutdown(cancel_futures=True)
