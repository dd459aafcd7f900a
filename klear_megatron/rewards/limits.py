"""Limits on the time that grading one response may take."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """CPU time decides, since it does not depend on what else the host does. The wider limit on
    wall-clock time ends what waits for ever."""

    cpu_s: float | None
    """None for work that waits for others, such as a judge's answer."""
    wall_s: float


def run_within(limits: Limits, function: Callable[..., T], *arguments: Any) -> T:
    """Call the function in this process, which the kernel kills when a limit is reached.

    Nothing that runs in the process could be relied on to end it: a long integer operation lets no
    other thread or signal handler run, and the process that started this one may be gone by then.
    """
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s or 0)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
    try:
        return function(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def prepare_process() -> None:
    """Let the timers of `run_within` kill this process, whatever handlers it inherited, and SIGTERM
    not: a trainer that is told to stop ends the process when it wants to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def reached(exit_code: int | None) -> bool:
    """Whether a process with this exit code, as `multiprocessing` has it, was killed by a limit."""
    return exit_code is not None and -exit_code in _SIGNALS


_SIGNALS = (signal.SIGPROF, signal.SIGALRM)
