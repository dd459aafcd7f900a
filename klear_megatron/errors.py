"""The one exception that is meant for the user rather than for a developer, and advice in it."""

from __future__ import annotations  # a job's batch script may run under Python 3.9

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: config, data row, checkpoint, server. The message says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    rank: int | None = None
    """The rank that found it, if it was another than the one that raises it now."""


class Stopped(UserError):
    """The run was told to stop, and has done so. A UserError, so that it reaches all ranks."""

    def __init__(self, message: str = "told to stop; run it again to go on") -> None:
        super().__init__(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice on a name that is not known: the one that was meant, or else all there are."""
    names = list(known)
    meant = difflib.get_close_matches(name, names, 1, cutoff=0.7)
    return f"did you mean {meant[0]}?" if meant else f"there are: {', '.join(names)}"
