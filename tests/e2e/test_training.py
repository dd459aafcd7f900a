"""The trainers from the command line: real ranks, a real server, and a process that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from klear_megatron.config import load_config
from klear_megatron.trainers.config import RLConfig
from tests.e2e.conftest import ROOT, run_command

SMALL = ["--prompts_per_step", "4", "--prompts_per_mini_batch", "2", "--save_every", "1"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def head(path: Path, rows: int, to: Path) -> Path:
    to.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    return to


def test_sft_learns_and_a_resumed_run_is_the_uninterrupted_one(make_config, quickstart, tmp_path):
    config = str(make_config("sft"))
    data = head(quickstart / "sft.jsonl", 32 * 32, tmp_path / "sft.jsonl")
    arguments = ["sft", config, "--data.path", str(data), "--batch_size", "32"]
    whole = run_command(*arguments, "--run_dir", f"{tmp_path}/whole", ranks=2)
    assert whole.returncode == 0, whole.stderr
    losses = [row["train/loss"] for row in metrics(tmp_path / "whole")]
    assert len(losses) == 32
    assert losses[-1] < losses[0] / 2

    interrupted = [*arguments, "--run_dir", f"{tmp_path}/interrupted", "--save_every", "3"]
    with subprocess.Popen(
        [sys.executable, "-m", "klear_megatron", *interrupted],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as trainer:
        wait_for(tmp_path / "interrupted/checkpoints/step_00000003", trainer)
        trainer.kill()
    resumed = run_command(*interrupted, ranks=2)  # and on two ranks instead of one
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert [row["train/loss"] for row in metrics(tmp_path / "interrupted")] == pytest.approx(
        losses, rel=1e-4
    )


def wait_for(path: Path, process: subprocess.Popen[Any], timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name}"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_rl_trains_syncs_dumps_and_goes_on_after_it_is_killed(make_config, tmp_path):
    config = str(make_config("rl"))
    # The base model is never right, but its answers differ in format, so groups teach something.
    base = ["--policy.path", str(load_config(RLConfig, Path(config)).policy.path.parent / "base")]
    arguments = ["rl", config, *base, *SMALL, "--steps", "3"]
    run_dir = tmp_path / "rl"
    with subprocess.Popen(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            *["-m", "klear_megatron", *arguments],
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as torchrun:
        wait_for(run_dir / "checkpoints/step_00000001", torchrun, timeout=240)
        family = psutil.Process(torchrun.pid).children(recursive=True)
        assert any("sglang" in " ".join(process.cmdline()) for process in family)
        for process in [psutil.Process(torchrun.pid), *family]:
            if "sglang" not in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive

    resumed = run_command(*arguments, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        # The servers computed with the trainer's current weights, in every step and after resuming.
        if "rollout/log_prob_difference_max" in row:
            assert row["rollout/log_prob_difference_max"] < 1e-4
    for step in (1, 2, 3):
        dumps = sorted((run_dir / "rollouts").glob(f"step_{step:08}_*.jsonl"))
        responses = [json.loads(line) for path in dumps for line in path.read_text().splitlines()]
        assert len(responses) == 4 * 8
        assert {row["weight_version"] for row in responses} == {str(step - 1)}
        assert len({row["index"] for row in responses}) == 4
    assert list((run_dir / "tensorboard").iterdir())
    assert load_config(RLConfig, run_dir / "config.yaml").steps == 3
