"""Megatron's queue between a trainer and the processes that write its checkpoints.

Megatron-Core keeps the queue in a process of its own, which waits forever if the trainer is killed.
Ours is the same, but ends with the trainer, however that ends.
"""

import multiprocessing
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from klear_megatron.platform.orphans import end_with_parent


def prepare_write_queue() -> None:
    """Makes the queue once. Call it before a save, or Megatron makes its own."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
