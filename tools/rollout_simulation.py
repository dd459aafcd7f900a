"""A discrete-event simulation of reinforcement learning: servers draw while a trainer trains.

Which server gets a prompt is decided by the run's own `Dispatch`; which prompts are asked ahead,
and when a step may begin, by its own `Buffer`. Without staleness a run draws in rounds, as
`_Rounds` does here. The rest is time: how fast servers decode, how long training takes, and so on.
"""

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy

from klear_megatron.rl.buffer import Buffer, Slot
from klear_megatron.rollout.dispatch import Capacity, Dispatch, Share
from tools.simulated_server import Server, Speed

_WARM_UP = 3
"""Steps that are not measured: the first ones find empty buffers."""
_NEWEST_WEIGHT = 0.01
"""Of the newest sequence in the mean length of sequences that the leaders give `Dispatch`."""


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
            f"server {i}": Server(self.env, scenario.speed) for i in range(scenario.servers)
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
