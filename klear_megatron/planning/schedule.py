"""The order of forwards and backwards on a rank of Megatron's pipeline, and what stays alive."""

from collections.abc import Callable, Iterator

Task = tuple[int, int]
"""(micro-batch, virtual stage)"""


def tasks(micro_batches: int, stages: int, virtual: int, stage: int) -> Iterator[tuple[bool, Task]]:
    """(is it a forward, which) in the order of Megatron's 1F1B and interleaved schedules."""
    forwards = list(_order(micro_batches, stages, virtual))
    backwards = [(micro, virtual - 1 - chunk) for micro, chunk in forwards]
    if virtual == 1:
        warmup = stages - stage - 1
    elif micro_batches == stages:
        warmup = len(forwards)
    else:
        warmup = (stages - stage - 1) * 2 + (virtual - 1) * stages
    warmup = min(warmup, len(forwards))
    for task in forwards[:warmup]:
        yield True, task
    steady = len(forwards) - warmup
    for number in range(steady):
        yield True, forwards[warmup + number]
        yield False, backwards[number]
    for task in backwards[steady:]:
        yield False, task


def _order(micro_batches: int, stages: int, virtual: int) -> Iterator[Task]:
    """Interleaved: as many micro-batches as there are stages, through one chunk after another."""
    group = stages if virtual > 1 else micro_batches
    for start in range(0, micro_batches, group):
        for chunk in range(virtual):
            for micro in range(start, min(start + group, micro_batches)):
                yield micro, chunk


def peak(
    schedule: Iterator[tuple[bool, Task]], saved_and_most: Callable[[Task], tuple[int, int]]
) -> int:
    """The most bytes alive at a time.

    Args:
        saved_and_most: of a task, what it has saved at the end of its forward, and the most that it
            has alive in its backward.
    """
    alive = most = 0
    for forward, task in schedule:
        saved, in_backward = saved_and_most(task)
        if forward:
            alive += saved
            most = max(most, alive)
        else:
            most = max(most, alive - saved + in_backward)
            alive -= saved
    return most
