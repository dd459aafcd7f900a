"""Being told to stop: by SIGTERM, which Slurm sends before a job's time is over.

The handler only notes it. Whoever is between two steps, or waits for something that may take long,
looks and raises `Stopped`, which ends the command with `exit_codes.CONTINUE`.
"""

import asyncio
import concurrent.futures
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from klear_megatron.errors import Stopped
from klear_megatron.platform import tensors

T = TypeVar("T")

LOOK_AGAIN_S = 0.2
_told = False


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Notes SIGTERM instead of dying of it. For the main thread."""
    global _told
    before = signal.signal(signal.SIGTERM, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _told = False


def _note(*_: object) -> None:
    global _told
    _told = True


def check() -> None:
    """Raises Stopped if this process was told to stop."""
    if _told:
        raise Stopped


def check_all() -> None:
    """Collective. Raises Stopped on all ranks if any was told to stop."""
    told = torch.tensor([int(_told)])
    tensors.add_up(told)
    if told.item():
        raise Stopped


async def unless_told(work: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns.

    Raises:
        Stopped: this process was told to stop; the coroutine was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            check()
            await asyncio.wait([task], timeout=LOOK_AGAIN_S)
    finally:
        if task.cancel():
            await asyncio.wait([task])
    if task.exception() is not None:
        check()  # servers get SIGTERM, too, and may be gone before we look
    return task.result()


def result_of(future: Future[T]) -> T:
    """What the future returns.

    Raises:
        Stopped: this process was told to stop.
    """
    while not concurrent.futures.wait([future], timeout=LOOK_AGAIN_S).done:
        check()
    return future.result()
