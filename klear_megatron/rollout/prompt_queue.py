"""Prompts that wait for an answer, and go to another server where one does not give it."""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """One prompt."""

    position: int
    prompt: Sequence[int]


class Work:
    """Prompts for many tasks of one event loop to take from, as lazily as they are made."""

    def __init__(self, prompts: Iterable[Sequence[int]]) -> None:
        self._new = (Item(i, prompt) for i, prompt in enumerate(prompts))
        self._again: list[Item] = []
        self._in_hand = 0
        self._taken_all = False
        self._changed = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether all are done, and this has been found out by one who wanted to take another."""
        return self._taken_all and not self._again and not self._in_hand

    async def take(self) -> Item | None:
        """The next one; None when all are done.

        While others have the last ones in hand it waits, as they may come back.
        """
        while True:
            if self._again:
                return self._again.pop()
            if (item := next(self._new, None)) is not None:
                return item
            self._taken_all = True
            if not self._in_hand:
                return None
            self._changed.clear()
            await self._changed.wait()

    @contextlib.contextmanager
    def in_hand(self, item: Item) -> Iterator[None]:
        """It is done when this is left, or waits again if that is by an exception."""
        self._in_hand += 1
        try:
            yield
        except BaseException:
            self._again.append(item)
            raise
        finally:
            self._in_hand -= 1
            self._changed.set()
