"""The processes that write checkpoints, and Megatron's queue between them and the trainer.

Megatron-Core forks a process for each save in the background. In 0.16, this process, or the trainer
itself where it waits for the save, forks more that do the writing; in 0.19, it writes. The queue is
a process of its own. They would wait forever for a trainer that is killed, and the trainer forever
for a writer that is killed. Ours are the same, but end with the trainer, however that ends, and not
of the SIGTERM that a trainer stops by; and the death of a writer is an error.
"""

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    AsyncRequest,
    TemporalAsyncCaller,
)
from torch.distributed.checkpoint.api import CheckpointException

from klear_megatron.errors import UserError
from klear_megatron.platform import objects
from klear_megatron.platform.orphans import (
    deaf_children,
    end_forks_with_parent,
    end_with_parent,
)

_KILLED = (ConnectionError, EOFError)
"""What a process is told that asks another, which was killed."""
_writers: list[ForkProcess] = []
"""Those of the save that this process waits for."""


def prepare_writers() -> None:
    """Makes the queue, if there is none yet or its process was killed. Call it before a save, or
    Megatron makes its own."""
    results = filesystem_async._results_queue
    if results is None:
        end_forks_with_parent()
    elif results.answers():
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    with deaf_children():
        manager.start(end_with_parent)
    filesystem_async._results_queue = _Results(manager.Queue())


class _Results:
    """The queue, which holds the result of this rank's save. When its process has been killed, the
    result is an error that says so."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def answers(self) -> bool:
        try:
            self._queue.empty()
        except _KILLED:
            return False
        return True

    def put(self, result: Any) -> None:
        with contextlib.suppress(*_KILLED):  # `get_nowait` tells
            self._queue.put(result)

    def get_nowait(self) -> Any:
        try:
            return self._queue.get_nowait()
        except _KILLED:
            return RuntimeError(
                "the process that keeps the writers' results was killed, perhaps for want of "
                "memory; the checkpoint is not complete, earlier ones are"
            )

    def empty(self) -> bool:
        return self.answers() and bool(self._queue.empty())


class BackgroundSaves(AsyncCallsQueue):  # type: ignore[misc]
    """Megatron's queue of saves in the background; but when a process that it forks is killed, the
    save fails on all ranks, with a CheckpointException that says how that ended."""

    def _get_async_caller(self) -> TemporalAsyncCaller:
        return _WatchedCaller()


class _WatchedCaller(TemporalAsyncCaller):  # type: ignore[misc]
    def close(self, abort: bool = False) -> None:
        process = self.process
        super().close(abort)  # waits for its end
        results = filesystem_async._results_queue
        if process is not None and process.exitcode and results.empty():
            results.put(RuntimeError(_death(process.exitcode)))


def watch_writers(request: AsyncRequest) -> AsyncRequest:
    """The same request; but when a process that it forks is killed, the save fails on all ranks,
    with Megatron's CheckpointException."""
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(async_fn=functools.partial(_write, request.async_fn))


@contextlib.contextmanager
def failure_on_all_ranks() -> Iterator[None]:
    """Collective. Around the end of a save, whose failure Megatron explains to the first rank only.

    Raises:
        UserError: on all ranks, if the checkpoint could not be written on any of them.
    """
    try:
        yield
    except CheckpointException as error:
        reasons = {str(reason) for reason, _ in error.failures.values()}
        what = objects.broadcast("; ".join(sorted(reasons)))
        raise UserError(f"a checkpoint could not be written: {what}") from error


def _write(write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    try:
        with _noticing_deaths():
            write(*args, **kwargs)
    except _WriterDied as error:
        # Megatron takes it for this rank's result, and tells the other ranks.
        filesystem_async._results_queue.put(RuntimeError(str(error)))
    finally:
        # They may wait for the dead one's locks, and this process would wait for them at its end.
        for writer in _writers:
            writer.kill()


class _WriterDied(BaseException):
    """No Exception, because a signal raises it in any line of the main thread. Where that line is
    in a handler of a log record, `logging` would print an Exception, and go on to wait forever."""


@contextlib.contextmanager
def _noticing_deaths() -> Iterator[None]:
    """Raises in the main thread, which waits at a semaphore: only a signal can reach it there."""
    fork: Any = multiprocessing.get_context("fork")
    before = signal.signal(signal.SIGCHLD, _look)
    _writers.clear()
    fork.Process = _Writer
    try:
        yield
    finally:
        del fork.Process
        signal.signal(signal.SIGCHLD, before)


class _Writer(ForkProcess):
    def start(self) -> None:
        super().start()
        _writers.append(self)
        _look()


def _look(*_: object) -> None:
    for code in [writer.exitcode for writer in _writers]:
        if code:
            raise _WriterDied(_death(code))


def _death(code: int) -> str:
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return (
        f"a process that writes the checkpoint ended {how}, perhaps for want of memory; "
        "the checkpoint is not complete, earlier ones are"
    )
