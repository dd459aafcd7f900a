"""A server of the simulation: how long it decodes what it is given."""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy


@dataclass(frozen=True)
class Speed:
    """How long a server computes. A decode step makes one token of every sequence in flight."""

    step_s: float
    """Seconds of a decode step, however little is in flight: reading the weights."""
    sequence_s: float
    """Further seconds per sequence in flight."""
    cached_token_s: float
    """Further seconds per token in the KV cache of these sequences."""
    prefill_token_s: float
    """Seconds per token of a prompt, or of a sequence that goes on under new weights."""


class Server:
    """Decodes what it is given. All sequences in flight advance by one token per decode step, so a
    clock of decoded tokens says when each is finished."""

    def __init__(self, env: simpy.Environment, speed: Speed) -> None:
        self._env = env
        self._speed = speed
        self._clock = 0.0
        self._at = 0.0
        """When the clock was last read."""
        self._debt = 0.0
        """Seconds of prefill before decoding goes on."""
        self._running: list[tuple[float, int, float, Callable[[], None]]] = []
        """A heap: finished at this clock, number, tokens at clock 0, whom to tell."""
        self._base_tokens = 0.0
        """Tokens that the sequences in flight would have in the cache at clock 0."""
        self._numbers = itertools.count()
        self._epoch = 0
        self._paused = False
        self.idle_s = 0.0
        self.sequence_seconds = 0.0

    def start(self, prompt_tokens: int, lengths: Sequence[int], done: Callable[[], None]) -> None:
        """Begins the responses to one prompt, which is read once."""
        self.read_clock()
        self._debt += prompt_tokens * self._speed.prefill_token_s
        for length in lengths:
            base = prompt_tokens - self._clock
            self._base_tokens += base
            entry = (self._clock + length, next(self._numbers), base, done)
            heapq.heappush(self._running, entry)
        self._plan()

    def begin_to_measure(self) -> None:
        self.read_clock()
        self.idle_s = self.sequence_seconds = 0.0

    def pause(self) -> None:
        self.read_clock()
        self._paused = True
        self._epoch += 1

    def go_on(self) -> None:
        """Continues after a pause; the cache is empty, so all sequences are read again."""
        self.read_clock()
        self._paused = False
        self._debt += self._cached * self._speed.prefill_token_s
        self._plan()

    @property
    def _cached(self) -> float:
        return self._base_tokens + len(self._running) * self._clock

    def _rates(self) -> tuple[float, float]:
        """Seconds of the next decode step, and by how much each further one is longer."""
        count = len(self._running)
        speed = self._speed
        seconds = speed.step_s + speed.sequence_s * count + speed.cached_token_s * self._cached
        return seconds, speed.cached_token_s * count

    def read_clock(self) -> None:
        passed, self._at = self._env.now - self._at, self._env.now
        self.sequence_seconds += passed * len(self._running)
        if self._paused or not self._running:
            self.idle_s += passed
            return
        prefill = min(self._debt, passed)
        self._debt -= prefill
        first, more = self._rates()
        decoding = passed - prefill
        # `first * n + more * n**2 / 2` seconds for n tokens.
        tokens = (
            (math.sqrt(first**2 + 2 * more * decoding) - first) / more if more else decoding / first
        )
        self._clock += tokens

    def _plan(self) -> None:
        """Wakes up when the next sequence is finished, unless something changes before."""
        self._epoch += 1
        if self._paused or not self._running:
            return
        epoch = self._epoch
        tokens = self._running[0][0] - self._clock
        first, more = self._rates()
        wake = self._env.timeout(max(0.0, self._debt + first * tokens + more * tokens**2 / 2))
        wake.callbacks.append(lambda _: self._finish(epoch))

    def _finish(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self.read_clock()
        finished = []
        while self._running and self._running[0][0] <= self._clock + 1e-6:
            _, _, base, done = heapq.heappop(self._running)
            self._base_tokens -= base
            finished.append(done)
        self._plan()
        for done in finished:
            done()
