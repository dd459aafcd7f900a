"""SHA256SUMS: the checksums stored beside a checkpoint's files, as `sha256sum --check` reads them.

In a Megatron checkpoint, .distcp files are left out: their records carry checksums themselves.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from klear_megatron.errors import UserError

_NAME = "SHA256SUMS"
_LINE = re.compile(r"[0-9a-f]{64} [ *].+")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Lists the files of the folder and of its `hf/`; those in `known` (name -> digest) are not
    read again."""
    files = sorted(f for f in (*folder.glob("*"), *folder.glob("hf/*")) if f.is_file())
    names = [str(f.relative_to(folder)) for f in files if f.suffix != ".distcp" and f.name != _NAME]
    lines = [f"{known.get(name) or sha256(folder / name)}  {name}\n" for name in names]
    (folder / _NAME).write_text("".join(lines))


def check_companions(folder: Path) -> None:
    """Checks all listed files except the weights against the folder's checksums, if it has any.

    Raises:
        UserError: a file is missing or has changed, or the list itself is damaged.
    """
    for name, digest in _listed(folder).items():
        if not _is_weights(name):
            _check(folder, name, digest)


@contextlib.contextmanager
def weights_being_checked(folder: Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Compares the safetensors files with the folder's checksums, in a thread.

    Yields:
        a function that waits for the result. It raises UserError if a file is missing or has
        changed.
    """
    listed = _listed(folder) if enabled else {}
    weights = filter(_is_weights, listed)
    with ThreadPoolExecutor(1, "checksums") as thread:
        checks = [thread.submit(_check, folder, name, listed[name]) for name in weights]

        def wait() -> None:
            for check in checks:
                check.result()

        try:
            yield wait
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


def _listed(folder: Path) -> dict[str, str]:
    """File name -> digest; empty where the folder has no checksums."""
    path = folder / _NAME
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not _LINE.fullmatch(line):
            raise UserError(
                f"{path}: line {number} is not a checksum and a file name; the file is corrupt. "
                "Delete it to skip the comparison"
            )
    return {line[66:]: line[:64] for line in lines}


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _check(folder: Path, name: str, digest: str) -> None:
    path, sums = folder / name, folder / _NAME
    if not path.is_file():
        raise UserError(f"{path}: listed in {sums}, but missing")
    if sha256(path) != digest:
        raise UserError(
            f"{path}: does not match its checksum in {sums}; the file is corrupt. If you have "
            f"edited it, remove its line from {_NAME}"
        )
