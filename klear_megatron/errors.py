"""The one exception that is meant for the user rather than for a developer, and advice in it."""

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input: config, data row, checkpoint, server. The message says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice on a name that is not known: the one that was meant, or else all there are."""
    names = list(known)
    meant = difflib.get_close_matches(name, names, 1)
    return f"did you mean {meant[0]}?" if meant else f"there are: {', '.join(names)}"


def make_folder(path: Path) -> None:
    """Makes a folder to write to, and those above it, where they are not there.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made or written to: {error.strerror}; choose another folder"
        ) from error
