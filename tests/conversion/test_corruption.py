"""A flipped bit, anywhere in a checkpoint: a clear error, or the result of the sound checkpoint."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from klear_megatron.conversion import hf_to_megatron, megatron_to_hf
from klear_megatron.errors import UserError
from tests.distributed.laboratory import make_policy
from tests.distributed.ranks import run_ranks
from tests.models import tiny

KINDS = {"hf": hf_to_megatron, "converted": megatron_to_hf, "trained": megatron_to_hf}
_FLIPS = 100


def _save(folder: Path) -> None:
    policy = make_policy(folder / "hf", parallel={"tensor_model_parallel_size": 2})
    policy.save(folder / "trained", {"step": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, and in `sound` what each of them becomes."""
    folder = tmp_path_factory.mktemp("corruption")
    config = tiny.qwen3(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=50)
    tiny.write(folder / "original", config)
    hf_to_megatron(folder / "original", folder / "converted", shard_bytes=8_000)
    megatron_to_hf(folder / "converted", folder / "hf", shard_bytes=8_000)
    run_ranks(2, _save, folder)
    for kind, convert in KINDS.items():
        convert(folder / kind, folder / "sound" / kind)
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _anywhere(size: int, numbers: random.Random) -> int:
    """An offset in a file; half of them where headers and directories are."""
    near_start, near_end = (min(size - 1, numbers.randrange(600)) for _ in range(2))
    return numbers.choice(
        [near_start, size - 1 - near_end, numbers.randrange(size), numbers.randrange(size)]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_is_no_wrong_checkpoint(kind: str, folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder / kind, tmp_path / kind)
    files = sorted(file for file in damaged.rglob("*") if file.is_file())
    sound = _content(folder / "sound" / kind)
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
            assert _content(tmp_path / "out") == sound, f"bit {bit} of byte {offset} of {file}"
            outcomes["no matter"] += 1
            shutil.rmtree(tmp_path / "out")
        file.write_bytes(content)
    # Otherwise the damage was not done where it matters.
    assert outcomes["refused"] > _FLIPS / 3, outcomes
