"""Every prompt is answered once, whoever gives back what he took."""

import asyncio
import collections
import itertools

import pytest

from klear_megatron.rollout.prompt_queue import Work


def test_prompts_are_made_only_as_they_are_taken_and_come_in_order():
    made = itertools.count()
    work = Work([next(made)] for _ in range(1_000_000))

    async def take_three():
        return [await work.take() for _ in range(3)]

    assert asyncio.run(take_three()) == [(0, [0]), (1, [1]), (2, [2])]
    assert next(made) == 3


async def answer(work: Work, fails: set[tuple[int, int]], *, tasks: int) -> list[int]:
    """Positions in the order in which they were done; `fails` has (position, attempt)."""
    done = []
    attempts = collections.Counter()

    async def worker():
        while (item := await work.take()) is not None:
            try:
                with work.in_hand(item):
                    await asyncio.sleep(0)
                    attempts[item.position] += 1
                    if (item.position, attempts[item.position]) in fails:
                        raise ConnectionError
            except ConnectionError:
                continue
            done.append(item.position)

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(worker())
    return done


@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_what_is_given_back_is_taken_again(tasks):
    work = Work([[i] for i in range(10)])
    fails = {(0, 1), (4, 1), (4, 2), (9, 1), (9, 2), (9, 3)}
    done = asyncio.run(asyncio.wait_for(answer(work, fails, tasks=tasks), 10))
    assert sorted(done) == list(range(10))
    assert work.finished


def test_idle_takers_wait_for_the_last_one_and_get_it_where_its_taker_is_cancelled():
    async def scenario():
        work = Work([[7]])
        item = await work.take()

        async def hang():
            with work.in_hand(item):
                await asyncio.Event().wait()

        hanging = asyncio.create_task(hang())
        waiting = asyncio.create_task(work.take())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert not work.finished
        hanging.cancel()
        assert await asyncio.wait_for(waiting, 1) == (0, [7])

    asyncio.run(scenario())
