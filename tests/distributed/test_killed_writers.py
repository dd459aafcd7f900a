"""A process of a save is killed: the save fails on all ranks, with one message."""

import functools
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async

from klear_megatron.errors import UserError
from klear_megatron.policy import writers
from klear_megatron.policy.checkpoint import checkpoint_path, latest_checkpoint
from tests.distributed.laboratory import RANKS_FORK_WRITERS, make_learner
from tests.distributed.ranks import run_ranks


def _learner(model: Path, asynchronous: bool) -> Any:
    return make_learner(model, checkpoint={"asynchronous": asynchronous})


def _save_to_the_end(learner: Any, run_dir: Path) -> None:
    learner.save(checkpoint_path(run_dir, 1), {"step": 1})
    learner.finish_saves()


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _writers_killed(model: Path, run_dir: Path) -> list[str]:
    """What this rank is told when a process of the last one's save is killed."""
    told = []
    cases = [
        (False, filesystem_async, "_write_item"),
        (True, filesystem_async, "_write_item"),
        (True, writers, "_noticing_deaths"),  # the process that Megatron-Core forks itself
    ]
    if not RANKS_FORK_WRITERS:
        del cases[0]
    for asynchronous, module, function in cases:
        learner = _learner(model, asynchronous)
        if dist.get_rank() == 1:
            setattr(module, function, _die)
        with pytest.raises(UserError) as failure:
            _save_to_the_end(learner, run_dir)
        told.append(str(failure.value))
    return told


def test_the_death_of_a_writer_ends_a_save_on_all_ranks(folder, tmp_path):
    told, same = run_ranks(2, _writers_killed, folder / "tied", tmp_path, timeout=60)
    assert told == same
    assert len(told) == 2 + RANKS_FORK_WRITERS
    assert all("a process that writes the checkpoint ended by SIGKILL" in text for text in told)
    assert latest_checkpoint(tmp_path) is None


def _queue_killed(model: Path, run_dir: Path) -> list[str]:
    """What this rank is told when the process that keeps the last one's results is killed."""
    rank, write = psutil.Process(), filesystem_async._write_item

    @functools.wraps(write)
    def kill_and_write(*args: Any, **kwargs: Any) -> Any:
        for child in rank.children():
            if any("spawn_main" in word for word in child.cmdline()):
                child.kill()
        return write(*args, **kwargs)

    if dist.get_rank() == 1:
        filesystem_async._write_item = kill_and_write
    told = []
    for asynchronous in (False, True):
        with pytest.raises(UserError) as failure:
            _save_to_the_end(_learner(model, asynchronous), run_dir)
        told.append(str(failure.value))
    return told


def test_the_death_of_the_writers_queue_ends_a_save_on_all_ranks(folder, tmp_path):
    told, same = run_ranks(2, _queue_killed, folder / "tied", tmp_path, timeout=60)
    assert told == same
    assert len(told) == 2
    assert all("the process that keeps the writers' results was killed" in text for text in told)
    assert latest_checkpoint(tmp_path) is None


class _Terminal:
    """While this process writes a line to it, a writer dies."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def write(self, _: str) -> None:
        if writers._writers and os.getpid() == self._process:
            writers._writers[0].kill()
            time.sleep(5)


def _writer_killed_while_the_rank_logs(model: Path, run_dir: Path) -> str:
    learner = _learner(model, False)
    filesystem_async._write_item = lambda *_, **__: time.sleep(60)
    filesystem_async.logger.setLevel(logging.DEBUG)
    filesystem_async.logger.addHandler(logging.StreamHandler(_Terminal()))
    with pytest.raises(UserError) as failure:
        _save_to_the_end(learner, run_dir)
    return str(failure.value)


@pytest.mark.skipif(not RANKS_FORK_WRITERS, reason="a rank that waits for a save writes it itself")
def test_the_death_of_a_writer_is_told_though_the_rank_writes_a_log(folder, tmp_path):
    rank = _writer_killed_while_the_rank_logs
    (told,) = run_ranks(1, rank, folder / "tied", tmp_path, timeout=40)
    assert "a process that writes the checkpoint ended by SIGKILL" in told
