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


@dataclass(frozen=True)
class Capacity:
    """What a server has room for at a time."""

    sequences: int
    tokens: int
    """Of its KV cache."""


class Dispatch:
    """Gives each prompt to the server with the fewest of this leader's prompts in flight.

    Three rules keep the servers evenly loaded by all leaders together:

    - Each server has places for prompts, and they are dealt to the leaders: no leader takes those
      of another, so a prompt waits at its leader, which can give it to any server, and never at a
      server that is full. With more leaders than places each leader still has one.
    - A server has as many places as its KV cache holds sequences of `sequence_tokens`, and no more
      than it runs at a time.
    - Of equally loaded servers, prompt p of leader l goes to server (l + p * leaders) mod servers,
      or to the next one after it. Prompts that are dealt to leaders in turn, as training does, are
      thus dealt to the servers in turn.

    Args:
        group_size: sequences of one prompt, which are all generated at the same time.
    """

    def __init__(self, servers: Sequence[str], group_size: int, share: Share) -> None:
        self._servers = list(servers)
        self._number = {url: number for number, url in enumerate(servers)}
        self._group_size = group_size
        self._share = share
        self._open: dict[str, Capacity] = {}
        self._in_flight: Counter[str] = Counter()
        self.sequence_tokens = 0.0
        """Tokens of an average sequence in flight; 0 while nothing is known of them."""

    def open(self, url: str, capacity: Capacity) -> None:
        """The server takes prompts from now on."""
        self._open[url] = capacity

    def close(self, url: str) -> None:
        """The server gets no more prompts."""
        self._open.pop(url, None)

    def places(self, url: str) -> int:
        """Prompts that this leader may have in flight at the open server."""
        capacity = self._open[url]
        sequences = capacity.sequences
        if self.sequence_tokens:
            sequences = min(sequences, int(capacity.tokens / self.sequence_tokens))
        places, share = sequences // self._group_size, self._share
        # Dealt on from server to server, so that all leaders have as many, to within one.
        first = (share.leader - self._number[url] * places) % share.leaders
        return max(1, len(range(first, places, share.leaders)))

    @property
    def has_place(self) -> bool:
        """Whether a server can take a prompt now."""
        return any(self._in_flight[url] < self.places(url) for url in self._open)

    def enter(self, position: int) -> str:
        """Takes a place for the prompt of this position, where there is one.

        Returns:
            The server to give the prompt to.
        """
        count = len(self._servers)
        first = self._share.leader + position * self._share.leaders
        in_turn = (self._servers[(first + i) % count] for i in range(count))
        free = [
            url for url in in_turn if url in self._open and self._in_flight[url] < self.places(url)
        ]
        url = min(free, key=self._in_flight.__getitem__)
        self._in_flight[url] += 1
        return url

    def leave(self, url: str) -> None:
        """The prompt is answered or lost; its place is free again."""
        self._in_flight[url] -= 1
