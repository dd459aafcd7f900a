"""Short names of data and files by what is in them, wherever they lie."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 64 * 1024


def fingerprint(parts: Iterable[bytes]) -> str:
    """128 bits in hexadecimal that differ if any part differs."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def samples(file: Path) -> Iterable[bytes]:
    """The file's size and about a megabyte of it, from evenly spaced places.

    That tells one set of trained weights from another, and takes no time where the whole would.
    """
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    with file.open("rb") as content:
        for number in range(_SAMPLES):
            content.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            yield content.read(_SAMPLE_BYTES)
