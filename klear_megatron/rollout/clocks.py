"""Time limits of prompts, which do not count the time that a server has no room for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx

from klear_megatron.rollout.requests import NoAnswerError, has_waiting

LOOK_EVERY_S = 10.0


class Clocks:
    """One clock per prompt in flight. Those of a server stand still while any request waits there,
    since it may be one of them; `hold` sees to that.

    Args:
        limit_s: that the answer to a prompt may take.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: dict[str, set[asyncio.Timeout]] = {}

    @contextlib.asynccontextmanager
    async def limit(self, url: str) -> AsyncIterator[None]:
        """Ends what the block awaits from the server when its time is over.

        Raises:
            NoAnswerError: it is over.
        """
        running = self._running.setdefault(url, set())
        clock = asyncio.timeout(self._limit_s)
        running.add(clock)
        try:
            async with clock:
                yield
        except TimeoutError as error:
            raise NoAnswerError(
                f"{url}: no answer to /generate within {self._limit_s:.1f} s "
                "(rollout.request_timeout_s, and token_timeout_s per token)"
            ) from error
        finally:
            running.discard(clock)

    async def hold(self, url: str, client: httpx.AsyncClient) -> None:
        """Looks again and again whether requests wait at the server; never returns."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            running = self._running.get(url)
            if running and await has_waiting(client):
                for clock in running:
                    if (due := clock.when()) is not None and not clock.expired():
                        clock.reschedule(due + LOOK_EVERY_S)
