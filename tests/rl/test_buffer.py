"""What is asked ahead of training keeps to the bound, loses no prompt and prefers no length.

Time is simulated: responses of long-tailed lengths, and a trainer that takes its groups in between.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from klear_megatron.rl.buffer import Buffer, Slot

PER_STEP = 8


@dataclass
class Run:
    """What happened in a simulated run."""

    asked: list[int] = field(default_factory=list)
    """The version of the weights when each prompt was asked."""
    taken: list[list[Slot[int]]] = field(default_factory=list)
    """By step, with those that were replaced before it. A group is its prompt's number."""
    seconds: float = 0.0
    idle: float = 0.0
    """Seconds in which nothing was drawn."""

    @property
    def trained(self) -> list[list[int]]:
        return [[slot.row for slot in step if slot.informative] for step in self.taken]

    @property
    def seen(self) -> list[int]:
        """All prompts that a step trained on or counted as dropped."""
        return [slot.row for step in self.taken for slot in step]


def simulate(
    buffer: Buffer[int],
    steps: int,
    seconds: Callable[[int], float],
    informative: Callable[[int], bool] = lambda row: True,
    train_seconds: float = 1.0,
) -> Run:
    """`seconds(row)` from asking a prompt to the end of its longest response."""
    run, rows = Run(), itertools.count()
    drawing: list[tuple[float, int, Slot[int]]] = []
    now = 0.0

    def ask() -> None:
        while buffer.has_room:
            row = next(rows)
            run.asked.append(buffer.version)
            heapq.heappush(drawing, (now + seconds(row), row, buffer.ask(row)))

    def draw_until(end: float) -> None:
        nonlocal now
        while drawing and drawing[0][0] <= end:
            now, row, slot = heapq.heappop(drawing)
            buffer.settle(slot, row, informative=informative(row))
            ask()
        if end < float("inf"):
            run.idle += 0.0 if drawing else end - now
            now = end

    for step in range(steps):
        ask()
        while not buffer.ready:
            draw_until(drawing[0][0])
        run.taken.append(buffer.take())
        draw_until(now + train_seconds)
        buffer.advance(step + 1)
    run.seconds = now
    return run


def long_tailed(row: int) -> float:
    """Seconds: a median of 0.4, and one prompt in 50 with more than 8 times that."""
    return float(np.random.default_rng([7, row]).lognormal(np.log(0.4), 1.0))


def half(row: int) -> bool:
    return bool(np.random.default_rng([9, row]).random() < 0.5)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("train_seconds", [0.0, 0.5, 4.0])
def test_no_group_is_older_than_the_bound_and_no_prompt_is_lost(
    max_staleness, batches, train_seconds
):
    buffer: Buffer[int] = Buffer(max_staleness, PER_STEP, batches)
    run = simulate(buffer, 60, long_tailed, half, train_seconds)
    staleness = [
        step - run.asked[slot.row] for step, slots in enumerate(run.taken) for slot in slots
    ]
    assert min(staleness) >= 0
    assert max(staleness) == max_staleness
    left = [slot.row for slot in [*buffer.slots, *buffer.replaced]]
    assert sorted(run.seen + left) == list(range(len(run.asked)))
    for step in run.taken:
        assert len(step) <= batches * PER_STEP * (max_staleness + 1)
        assert sum(slot.informative for slot in step) <= PER_STEP
    assert len(run.asked) <= batches * PER_STEP * (60 + max_staleness)


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_trained_lengths_do_not_depend_on_staleness(max_staleness):
    """Not only their distribution: with rewards that do not depend on length, the groups that are
    trained are the same ones, step by step."""
    runs = [simulate(Buffer(n, PER_STEP, 8), 60, long_tailed, half) for n in (0, max_staleness)]
    assert runs[1].trained == runs[0].trained
    # Of all lengths: the first informative prompts in the order of the data, without exception.
    drawn = [row for row in range(len(runs[0].asked)) if half(row)]
    assert list(itertools.chain(*runs[0].trained)) == drawn[: 60 * PER_STEP]
    # And in less time, although it waits for slow responses too.
    assert runs[1].seconds < 0.8 * runs[0].seconds


def test_drawing_goes_on_while_the_trainer_trains():
    def takes_a_second(row: int) -> float:
        return 1.0

    ahead, waiting = (simulate(Buffer(n, PER_STEP, 1), 50, takes_a_second) for n in (1, 0))
    assert waiting.seconds == 100
    assert waiting.idle == 50
    assert ahead.seconds == 51  # the first groups are waited for
    assert ahead.idle == 1  # those drawn ahead at the start are there with them


def test_an_uninformative_group_is_replaced_by_one_prompt_within_the_limit():
    def never(row: int) -> bool:
        return False

    run = simulate(Buffer(0, PER_STEP, 3), 10, long_tailed, never)
    assert [len(step) for step in run.taken] == [3 * PER_STEP] * 10
    assert run.trained == [[]] * 10
    ahead = simulate(Buffer(2, PER_STEP, 3), 10, long_tailed, never)
    assert ahead.trained == [[]] * 10
    assert len(ahead.asked) == 3 * PER_STEP * 12

    def first_two_not(row: int) -> bool:
        return row >= 2

    run = simulate(Buffer(0, PER_STEP, 2), 1, long_tailed, first_two_not)
    assert run.trained == [list(range(2, PER_STEP + 2))]
    assert sorted(run.seen) == list(range(PER_STEP + 2))


def test_a_leader_without_groups_never_asks_and_is_always_ready():
    buffer: Buffer[int] = Buffer(1, 0, 2)
    assert not buffer.has_room
    assert buffer.ready
    assert buffer.take() == []
