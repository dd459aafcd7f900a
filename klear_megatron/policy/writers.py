"""The processes that write checkpoints, and Megatron's queue between them and the trainer.

Megatron-Core forks the writers, and keeps the queue in a process of its own. They would wait
forever for a trainer that is killed. Ours are the same, but end with the trainer, however that
ends, and not of the SIGTERM that a trainer stops by.
"""

import multiprocessing
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from klear_megatron.platform.orphans import end_forks_with_parent, end_with_parent


def prepare_writers() -> None:
    """Makes the queue once. Call it before a save, or Megatron makes its own."""
    if filesystem_async._results_queue is None:
        end_forks_with_parent()
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
