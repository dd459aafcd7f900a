"""SHA256SUMS: the checksums beside a checkpoint's files, as `sha256sum --check` reads them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from klear_megatron.errors import UserError

_NAME = "SHA256SUMS"


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Lists all files of the folder; those in `known` (name -> digest) are not read again."""
    names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name != _NAME)
    lines = [f"{known.get(name) or sha256(folder / name)}  {name}\n" for name in names]
    (folder / _NAME).write_text("".join(lines))


def check_weights(folder: Path) -> None:
    """Compares the safetensors files with the folder's checksums, if it has any.

    Other files may have been edited since, which their readers will see.

    Raises:
        UserError: a listed file is missing or has changed.
    """
    sums = folder / _NAME
    if not sums.is_file():
        return
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if path.suffix != ".safetensors":
            continue
        if not path.is_file():
            raise UserError(f"{path}: listed in {sums}, but missing")
        if sha256(path) != digest:
            raise UserError(
                f"{path}: not the bytes that {sums} was written for; the file is corrupt"
            )
