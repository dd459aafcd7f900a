"""Which server gets the next prompt. Pure: it knows no network and no clock."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The part of the servers that one of several leaders uses. Leaders do not see each other's
    load."""

    leader: int = 0
    leaders: int = 1


class Dispatch:
    """Gives each prompt to the server with the fewest of this leader's prompts in flight.

    Two rules keep the servers evenly loaded by all leaders together:

    - Each server has places for prompts, and they are dealt to the leaders: no leader takes those
      of another, so a prompt waits at its leader, which can give it to any server, and never at a
      server that is full. With more leaders than places each leader still has one.
    - Of equally loaded servers, prompt p of leader l goes to server (l + p * leaders) mod servers,
      or to the next one after it. Prompts that are dealt to leaders in turn, as training does, are
      thus dealt to the servers in turn.

    Args:
        places: prompts that one server generates at a time, for all leaders.
    """

    def __init__(self, servers: Sequence[str], places: int, share: Share) -> None:
        self._servers = list(servers)
        self._share = share
        self._places = {
            # Dealt on from server to server, so that all leaders have as many, to within one.
            url: max(
                1, len(range((share.leader - k * places) % share.leaders, places, share.leaders))
            )
            for k, url in enumerate(servers)
        }
        self._in_flight: Counter[str] = Counter()
        self._open: set[str] = set()

    def open(self, url: str) -> None:
        """The server takes prompts from now on."""
        self._open.add(url)

    def close(self, url: str) -> None:
        """The server gets no more prompts."""
        self._open.discard(url)

    @property
    def has_place(self) -> bool:
        """Whether a server can take a prompt now."""
        return any(self._in_flight[url] < self._places[url] for url in self._open)

    def enter(self, position: int) -> str:
        """Takes a place for the prompt of this position, where there is one.

        Returns:
            The server to give the prompt to.
        """
        count = len(self._servers)
        first = self._share.leader + position * self._share.leaders
        in_turn = (self._servers[(first + i) % count] for i in range(count))
        free = [
            url for url in in_turn if url in self._open and self._in_flight[url] < self._places[url]
        ]
        url = min(free, key=self._in_flight.__getitem__)
        self._in_flight[url] += 1
        return url

    def leave(self, url: str) -> None:
        """The prompt is answered or lost; its place is free again."""
        self._in_flight[url] -= 1
