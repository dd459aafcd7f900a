"""Every prompt is answered once, whichever server gives it back."""

import asyncio
import itertools
from collections import Counter

import pytest

from klear_megatron.rollout.prompt_queue import PromptQueue


def test_prompts_are_made_only_as_they_are_taken_and_come_in_order():
    made = itertools.count()
    queue = PromptQueue([next(made)] for _ in range(1_000_000))

    async def take_three():
        return [await queue.take() for _ in range(3)]

    assert asyncio.run(take_three()) == [(0, [0]), (1, [1]), (2, [2])]
    assert next(made) == 3


async def answer(queue: PromptQueue, fails: set[tuple[int, int]], *, tasks: int) -> list[int]:
    """Positions in the order in which they were done; `fails` has (position, attempt)."""
    done = []
    attempts = Counter()

    async def worker():
        while (item := await queue.take()) is not None:
            await asyncio.sleep(0)
            attempts[item.position] += 1
            if (item.position, attempts[item.position]) in fails:
                queue.give_back(item)
            else:
                done.append(item.position)
                queue.done()

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(worker())
    return done


@pytest.mark.parametrize("tasks", [1, 3, 20])
def test_what_is_given_back_is_taken_again(tasks):
    queue = PromptQueue([[i] for i in range(10)])
    fails = {(0, 1), (4, 1), (4, 2), (9, 1), (9, 2), (9, 3)}
    done = asyncio.run(asyncio.wait_for(answer(queue, fails, tasks=tasks), 10))
    assert sorted(done) == list(range(10))


def test_idle_takers_wait_for_the_last_prompt_and_get_it_if_it_comes_back():
    async def scenario():
        queue = PromptQueue([[7]])
        item = await queue.take()
        waiting = [asyncio.create_task(queue.take()) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        queue.give_back(item)
        done, waiting = await asyncio.wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
        assert [task.result() for task in done] == [(0, [7])]
        queue.done()
        assert await asyncio.wait_for(*waiting, 1) is None

    asyncio.run(scenario())
