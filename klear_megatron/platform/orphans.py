"""Child processes that end with their parent, and not before. They import this, so it imports
little."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_forking = 0
"""The process that forks, for its child."""


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside never see SIGTERM or Ctrl-C, which may be sent to all
    processes of a rank. This holds from their first instruction, before they could ignore a signal.
    The process that starts them gets its own signals when the context ends."""
    resource_tracker.ensure_running()  # the first process starts it, which unblocks both signals
    with blocked(signal.SIGTERM, signal.SIGINT):
        yield


@contextlib.contextmanager
def blocked(*signals: signal.Signals) -> Iterator[None]:
    """This process gets these signals when the context ends. What it starts inside begins with
    them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Makes a process that `multiprocessing` started end once its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A thread, because `die_with_parent` would also end it with a mere thread of the parent.
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def end_forks_with_parent() -> None:
    """From now on, what this process forks from its main thread ends with it, and ignores SIGTERM
    and Ctrl-C. So do forks of forks. For the processes of libraries. Call it once."""
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _before_fork() -> None:
    global _forking
    _forking = os.getpid()


def _after_fork() -> None:
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, signal.SIG_IGN)
    die_with_parent(_forking)


def end_with_torchrun() -> None:
    """Makes a rank that torchrun started end with torchrun, however that ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, which has to be the
    main thread of the process `parent`. Holds for what it executes, and not for what it forks."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
