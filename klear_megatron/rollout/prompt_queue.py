"""Prompts that wait for an answer, and wait again where the server that had them gives none."""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """One prompt."""

    position: int
    prompt: Sequence[int]


_LOOK_AGAIN_S = 0.02


class PromptQueue:
    """The prompts of one event loop, made only as they are taken.

    Args:
        prompts: None among them means that the next prompt may not be asked yet.
    """

    def __init__(self, prompts: Iterable[Sequence[int] | None]) -> None:
        self._prompts = iter(prompts)
        self._positions = itertools.count()
        self._again: list[Item] = []
        self._in_hand = 0
        self._changed = asyncio.Event()

    async def take(self) -> Item | None:
        """The next prompt, which is in hand until it is `done` or `give_back` returns it.

        Waits while the last prompts are in hand, as they may come back. None when all are done.
        """
        while True:
            if self._again:
                self._in_hand += 1
                return self._again.pop()
            try:
                prompt = next(self._prompts)
            except StopIteration:
                if not self._in_hand:
                    return None
                self._changed.clear()
                await self._changed.wait()
                continue
            if prompt is not None:
                self._in_hand += 1
                return Item(next(self._positions), prompt)
            await asyncio.sleep(_LOOK_AGAIN_S)

    def done(self) -> None:
        """A prompt in hand has been answered."""
        self._in_hand -= 1
        self._changed.set()

    def give_back(self, item: Item) -> None:
        """The prompt in hand has not been answered and waits again, before all others."""
        self._again.append(item)
        self.done()
