"""A flipped bit anywhere in a checkpoint gives a clear error or the sound checkpoint's result."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.errors import UserError

KINDS = {"hf": hf_to_megatron, "converted": megatron_to_hf, "trained": megatron_to_hf}
_FLIPS = 100


@pytest.fixture(scope="module")
def sound(kinds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The conversions of a sound folder of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    for kind, convert in KINDS.items():
        convert(kinds / kind, folder / kind)
    return {kind: _content(folder / kind) for kind in KINDS}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _anywhere(size: int, numbers: random.Random) -> int:
    """An offset in a file; half of the draws hit headers and directories."""
    near_start, near_end = (min(size - 1, numbers.randrange(600)) for _ in range(2))
    return numbers.choice(
        [near_start, size - 1 - near_end, numbers.randrange(size), numbers.randrange(size)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_is_no_wrong_checkpoint(
    kind: str, kinds: Path, sound: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    damaged = shutil.copytree(kinds / kind, tmp_path / kind)
    files = sorted(file for file in damaged.rglob("*") if file.is_file())
    numbers = random.Random(0)
    outcomes: Counter[str] = Counter()
    for number in range(_FLIPS):
        file = files[number % len(files)]
        content = file.read_bytes()
        offset, bit = _anywhere(len(content), numbers), 1 << numbers.randrange(8)
        flipped = bytes([content[offset] ^ bit])
        file.write_bytes(content[:offset] + flipped + content[offset + 1 :])
        try:
            KINDS[kind](damaged, tmp_path / "out")
        except UserError:
            assert not (tmp_path / "out").exists()
            outcomes["refused"] += 1
        else:
            assert _content(tmp_path / "out") == sound[kind], (
                f"bit {bit} of byte {offset} of {file}"
            )
            outcomes["no matter"] += 1
            shutil.rmtree(tmp_path / "out")
        file.write_bytes(content)
    # Fewer would mean that the flips missed the bytes that matter.
    assert outcomes["refused"] > _FLIPS / 3, outcomes
