"""A rank that hangs ends all ranks, and each leaves its stack; a rank that is slow ends none."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from klear_megatron.platform import heartbeat, objects
from klear_megatron.training.watchdog import Watchdog
from tests.distributed.ranks import run_ranks
from tests.files import read_rows


def _second_rank_hangs() -> None:
    time.sleep(300)


def _wait_for_slow_then_for_hung(run_dir: Path, watchdog_s: float) -> None:
    with Watchdog(run_dir, watchdog_s):
        end = time.monotonic() + 2 * watchdog_s
        while dist.get_rank() == 1 and time.monotonic() < end:
            heartbeat.beat()
            time.sleep(0.1)
        objects.all_gather("as a rank waits for another one's generation")
        (run_dir / f"slow_{dist.get_rank()}").touch()
        if dist.get_rank() == 1:
            _second_rank_hangs()
        objects.all_gather("never")


def test_a_hung_rank_is_found_and_a_slow_one_is_waited_for(tmp_path):
    with pytest.raises(AssertionError, match=r"rank \d of 2: died without a word"):
        run_ranks(2, _wait_for_slow_then_for_hung, tmp_path, 3.0)
    assert len(list(tmp_path.glob("slow_*"))) == 2
    waits, hangs = ((tmp_path / "hang" / f"rank_0000{rank}.txt").read_text() for rank in range(2))
    assert "no rank has made progress for 3 s" in waits
    assert "in all_gather" in waits
    assert "in _second_rank_hangs" in hangs
    assert read_rows(tmp_path / "heartbeat.json")[0]["step"] == 0
