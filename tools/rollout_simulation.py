"""A discrete-event simulation of reinforcement learning: servers draw while a trainer trains.

Which server gets a prompt is decided by the run's own `Dispatch`; which prompts are asked ahead,
and when a step may begin, by its own `Buffer`. Without staleness a run draws in rounds, as
`_Rounds` does here. The rest is time: how fast servers decode, how long training takes, and so on.
"""

import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy

from klear_megatron.rl.buffer import Buffer, Slot
from klear_megatron.rollout.dispatch import Capacity, Dispatch, Share

_WARM_UP = 3
"""Steps that are not measured: the first ones find empty buffers."""
_NEWEST_WEIGHT = 0.01
"""Of the newest sequence in the mean length of sequences that the leaders give `Dispatch`."""


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


@dataclass(frozen=True)
class Scenario:
    """A run, and the time that each part of it takes."""

    servers: int
    leaders: int
    prompts_per_step: int
    responses_per_prompt: int
    max_staleness: int
    draw_length: Callable[[random.Random], int]
    """Tokens of a response."""
    prompt_tokens: int
    informative: float
    """The probability that a group teaches something."""
    max_generation_batches: int
    speed: Speed
    capacity: Capacity
    """Of a server."""
    leader_token_s: float
    """Seconds of a leader per token that it reads, one response after another."""
    grade_s: float
    """Seconds from a group's last response to its rewards, several groups at a time."""
    train_s: Callable[[Sequence[int]], float]
    """Lengths of a step's sequences -> seconds from the step's groups to the push."""
    push_s: float


@dataclass(frozen=True)
class Result:
    """Means over the measured steps."""

    step_s: float
    trainer_idle: float
    """Share of the time in which the trainer waits for groups."""
    servers_idle: float
    """Share of the time in which a server has no sequence in flight, or is paused for a push."""
    in_flight: float
    """Sequences in flight per server."""
    staleness: float
    """Mean over groups."""
    max_staleness: int
    tokens_per_step: float


def simulate(scenario: Scenario, steps: int = 12, seed: int = 0) -> Result:
    """Runs the scenario for so many steps, of which the first few are not measured."""
    return _Run(scenario, seed).run(steps)


class _Server:
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


class _Rounds:
    """What `rl.rollouts.Collector` does at staleness 0, for all leaders: it asks a whole step's
    prompts at a time, until enough groups are informative or the limit on batches is reached.

    `of` gives a leader the same methods that its `Buffer` would have.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._wanted = scenario.prompts_per_step
        self._batches = scenario.max_generation_batches
        self._leaders: list[_Round] = []
        self.version, self._rounds = 0, 1

    def of(self, share: int) -> "_Round":
        self._leaders.append(_Round(self, share))
        return self._leaders[-1]

    def begin(self, version: int) -> None:
        """The step that trains this version is drawn from now on, if it is not already."""
        if version > self.version:
            self.version, self._rounds = version, 1
            for leader in self._leaders:
                leader.asked, leader.settled = 0, []

    def look(self) -> None:
        """Begins another round if this one is settled and not the last."""
        if self._settled and not self.ready:
            self._rounds += 1
            for leader in self._leaders:
                leader.asked = 0

    @property
    def _settled(self) -> bool:
        settled = sum(len(leader.settled) for leader in self._leaders)
        return settled == self._rounds * self._wanted

    @property
    def ready(self) -> bool:
        informative = sum(slot.informative for one in self._leaders for slot in one.settled)
        enough = informative >= self._wanted
        return self._settled and (enough or self._rounds == self._batches)


class _Round:
    def __init__(self, rounds: _Rounds, share: int) -> None:
        self._rounds = rounds
        self._share = share
        self.asked = 0
        self.settled: list[Slot[list[int]]] = []

    @property
    def version(self) -> int:
        return self._rounds.version

    @property
    def has_room(self) -> bool:
        return self.asked < self._share

    def ask(self, row: int) -> Slot[list[int]]:
        self.asked += 1
        return Slot(row)

    def settle(self, slot: Slot[list[int]], group: list[int], *, informative: bool) -> None:
        slot.group, slot.informative = group, informative
        self.settled.append(slot)
        self._rounds.look()

    @property
    def ready(self) -> bool:
        return self._rounds.ready

    def take(self) -> list[Slot[list[int]]]:
        return self.settled

    def advance(self, version: int) -> None:
        self._rounds.begin(version)


class _Leader:
    """Keeps the servers busy with its share of the prompts, as far as its buffer has room."""

    def __init__(self, run: "_Run", number: int) -> None:
        scenario = run.scenario
        share = Share(number, scenario.leaders)
        mine = len(range(number, scenario.prompts_per_step, scenario.leaders))
        self.buffer: Buffer[list[int]] | _Round = run.rounds.of(mine)
        if scenario.max_staleness:
            self.buffer = Buffer(scenario.max_staleness, mine, scenario.max_generation_batches)
        self._run = run
        self._number = number
        self._dispatch = Dispatch(list(run.servers), scenario.responses_per_prompt, share)
        for url in run.servers:
            self._dispatch.open(url, scenario.capacity)
        self._asked = itertools.count()
        self._read = 0
        self._free_at = 0.0
        self._version_of: dict[int, int] = {}

    def fill(self) -> None:
        """Asks prompts while the buffer has room and a server has a place."""
        while not self._run.pushing and self.buffer.has_room and self._dispatch.has_place:
            self._ask()

    def _ask(self) -> None:
        run, scenario = self._run, self._run.scenario
        row = next(self._asked)
        slot = self.buffer.ask(row)
        self._version_of[row] = self.buffer.version
        url = self._dispatch.enter(row)
        draw = run.draw(self._number, row)
        lengths = [scenario.draw_length(draw) for _ in range(scenario.responses_per_prompt)]
        informative = draw.random() < scenario.informative
        missing = len(lengths)

        def one_done() -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                self._dispatch.leave(url)
                self._note(lengths)
                self._grade(slot, lengths, informative)
                self.fill()

        run.servers[url].start(scenario.prompt_tokens, lengths, one_done)

    def _note(self, lengths: Sequence[int]) -> None:
        for length in lengths:
            self._read += 1
            tokens = self._run.scenario.prompt_tokens + length
            weight = max(1 / self._read, _NEWEST_WEIGHT)
            self._dispatch.sequence_tokens += weight * (tokens - self._dispatch.sequence_tokens)

    def _grade(self, slot: Slot[list[int]], lengths: list[int], informative: bool) -> None:
        run, scenario = self._run, self._run.scenario
        now = run.env.now
        self._free_at = max(self._free_at, now) + sum(lengths) * scenario.leader_token_s

        def settle(_: simpy.Event) -> None:
            self.buffer.settle(slot, lengths, informative=informative)
            run.look()

        graded = run.env.timeout(self._free_at - now + scenario.grade_s)
        graded.callbacks.append(settle)

    def take(self, version: int) -> tuple[list[int], list[int]]:
        """The lengths of the next step's sequences, and the staleness of its groups."""
        lengths: list[int] = []
        staleness = []
        for slot in self.buffer.take():
            started = self._version_of.pop(slot.row)
            if slot.informative:
                assert slot.group is not None
                lengths += slot.group
                staleness.append(version - started)
        return lengths, staleness


class _Run:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.env = simpy.Environment()
        self._seed = seed
        self.pushing = False
        self.rounds = _Rounds(scenario)
        self.servers = {
            f"server {i}": _Server(self.env, scenario.speed) for i in range(scenario.servers)
        }
        self._leaders = [_Leader(self, i) for i in range(scenario.leaders)]
        self._ready = self.env.event()
        self._lengths: list[int] = []
        self._staleness: list[int] = []
        self._idle_s = 0.0
        self._began = 0.0

    def draw(self, leader: int, row: int) -> random.Random:
        """What is drawn for a prompt, the same in every scenario."""
        return random.Random(f"{self._seed} {leader} {row}")

    def look(self) -> None:
        """After a group is settled: asks more prompts, and wakes the trainer up if all leaders have
        their share of a step."""
        for leader in self._leaders:
            leader.fill()
        if not self._ready.triggered and all(leader.buffer.ready for leader in self._leaders):
            self._ready.succeed()

    def run(self, steps: int) -> Result:
        self.env.run(until=self.env.process(self._train(steps)))
        for server in self.servers.values():
            server.read_clock()
        measured = steps - _WARM_UP
        seconds = self.env.now - self._began
        servers = self.servers.values()
        return Result(
            step_s=seconds / measured,
            trainer_idle=self._idle_s / seconds,
            servers_idle=statistics.mean(server.idle_s for server in servers) / seconds,
            in_flight=statistics.mean(server.sequence_seconds for server in servers) / seconds,
            staleness=statistics.mean(self._staleness),
            max_staleness=max(self._staleness),
            tokens_per_step=sum(self._lengths) / measured,
        )

    def _train(self, steps: int) -> simpy.events.ProcessGenerator:
        for leader in self._leaders:
            leader.fill()
        for step in range(1, steps + 1):
            if step == _WARM_UP + 1:
                self._forget()
            waited_from = self.env.now
            self._ready = self.env.event()
            self.look()
            yield self._ready
            self._idle_s += self.env.now - waited_from
            lengths = self._take(step)
            yield self.env.timeout(self.scenario.train_s(lengths))
            yield from self._push(step)

    def _take(self, step: int) -> list[int]:
        lengths: list[int] = []
        for leader in self._leaders:
            mine, staleness = leader.take(version=step - 1)
            lengths += mine
            self._staleness += staleness
        for leader in self._leaders:
            leader.fill()
        wanted = self.scenario.prompts_per_step * self.scenario.responses_per_prompt
        self._lengths += lengths[:wanted]
        return lengths[:wanted]

    def _push(self, version: int) -> simpy.events.ProcessGenerator:
        self.pushing = True
        for server in self.servers.values():
            server.pause()
        yield self.env.timeout(self.scenario.push_s)
        self.pushing = False
        for server in self.servers.values():
            server.go_on()
        for leader in self._leaders:
            leader.buffer.advance(version)
            leader.fill()

    def _forget(self) -> None:
        """Begins to measure."""
        self._began = self.env.now
        self._idle_s = 0.0
        self._lengths, self._staleness = [], []
        for server in self.servers.values():
            server.begin_to_measure()
