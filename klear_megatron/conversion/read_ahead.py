"""Making the next item while the present one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items in the same order, each made in a thread while the last one is in use.

    Two of them are in memory at a time. Reading, copying and checking tensors does not hold
    Python's lock, so that a second core does it.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]
            del item
