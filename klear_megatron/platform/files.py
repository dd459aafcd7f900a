"""Folders and files that are written: checked first, and never seen half-written."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from klear_megatron.errors import UserError


def make_folder(path: Path) -> None:
    """Makes a writable folder and its parents; one that exists is kept as it is.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _check_writable(path)
    except OSError as error:
        raise _cannot_be_made(path, error) from error


def check_folder(path: Path) -> None:
    """As `make_folder`, but makes nothing."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _check_writable(nearest)
    except OSError as error:
        raise _cannot_be_made(path, error) from error


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _cannot_be_made(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be made or written to: {error.strerror}; choose another folder"
    )


def complete_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file; none if there is no file. Half a line that a killed process left
    at the end is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 text file that replaces `path`, as `replace_atomically` does."""
    with replace_atomically(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.detach()  # also flushes


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends without an exception.

    Until then, and after a crash of the process or the machine, `path` is what it was before.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Returns once the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
