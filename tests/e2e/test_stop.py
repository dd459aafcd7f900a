"""A run that is told to stop saves what it has, says so by its exit code, and goes on exactly."""

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from klear_megatron.cli import main
from klear_megatron.platform.locks import locked
from klear_megatron.policy.learner import Learner
from tests.distributed.ranks import run_ranks
from tests.documented import undocumented
from tests.files import read_rows


def command(arguments: list[str]) -> tuple[int, str]:
    """The command's exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(arguments), said.getvalue()


def _told_in_step(step: int, arguments: list[str]) -> tuple[int, str]:
    """Only the second rank gets SIGTERM, as it trains this step."""
    steps = iter(range(1, 1000))
    original = Learner.train_step

    def train_step(self: Learner, *args: Any) -> dict[str, float]:
        if next(steps) == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    Learner.train_step = train_step  # type: ignore[method-assign]
    return command(arguments)


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in read_rows(run_dir / "metrics.jsonl")]


def test_sft_that_is_told_to_stop_saves_its_step_and_goes_on_exactly(
    make_config, quickstart, tmp_path
):
    data = tmp_path / "sft.jsonl"
    rows = (quickstart / "sft.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(rows[: 8 * 16]))
    arguments = ["sft", str(make_config("sft")), "--data.path", str(data), "--batch_size", "16"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_ranks(2, command, [*arguments, "--run_dir", str(whole)])

    arguments += ["--run_dir", str(stopped), "--save_every", "4"]
    for code, said in run_ranks(2, _told_in_step, 3, arguments):
        assert code == 75, said
    assert [path.name for path in (stopped / "checkpoints").glob("step_*")] == ["step_00000003"]
    assert losses(stopped) == losses(whole)[:3]
    (main_rank, _) = run_ranks(2, command, arguments)
    assert main_rank[0] == 0
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 8

    with locked(stopped / "lock", ""):
        ((code, said),) = run_ranks(1, command, arguments)
    assert code == 2
    assert f"{stopped}: another trainer runs there" in said
    assert f"process {os.getpid()} on" in said
    begin = (stopped / "metrics.jsonl").stat().st_mtime_ns
    ((code, said),) = run_ranks(1, command, arguments)
    assert code == 0
    assert "finished: step 8 of 8 is done; nothing to do" in said
    assert (stopped / "metrics.jsonl").stat().st_mtime_ns == begin


def test_the_loss_of_held_out_conversations(make_config, quickstart, tmp_path):
    """Of the same conversations, it is the loss of the next step, which is computed before it."""
    data = tmp_path / "sft.jsonl"
    rows = (quickstart / "sft.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:16]))
    arguments = ["sft", str(make_config("sft")), "--data.path", str(data), "--batch_size", "16"]
    arguments += ["--steps", "3", "--run_dir", str(tmp_path / "run")]
    arguments += ["--validation.path", str(data), "--validation.every", "2"]
    assert [code for code, _ in run_ranks(2, command, arguments)] == [0, 0]
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics if "val/loss" in row] == [0, 2, 3]
    trained = {row["step"]: row["train/loss"] for row in metrics if "train/loss" in row}
    for row in metrics[:3:2]:
        assert row["val/loss"] == pytest.approx(trained[row["step"] + 1], rel=1e-5)
    assert undocumented(metrics) == []
