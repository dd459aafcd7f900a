"""The processes that write checkpoints outlive signals that are sent to all processes of a rank."""

import threading

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async

from klear_megatron.policy.writers import prepare_writers
from tests.distributed.ranks import run_ranks


def _told_to_end_as_they_start() -> tuple[int, str]:
    """How often they were told, and what the queue has kept."""
    started = threading.Event()
    told = 0

    def tell() -> None:
        nonlocal told
        while not started.wait(0.01):
            for child in psutil.Process().children():
                child.terminate()
                told += 1

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        prepare_writers()
    finally:
        started.set()
        teller.join()
    filesystem_async._results_queue.put("kept")
    return told, filesystem_async._results_queue.get()


def test_sigterm_to_all_processes_of_a_rank_leaves_the_queue_that_starts():
    ((told, answer),) = run_ranks(1, _told_to_end_as_they_start)
    assert told
    assert answer == "kept"
