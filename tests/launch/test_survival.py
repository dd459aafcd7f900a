"""A trainer on a real Slurm that is killed, hangs and runs out of time has the losses of one left
alone."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from klear_megatron.launch.status import status
from tests.commands import ROOT, run_command
from tests.files import read_rows
from tests.launch.conftest import wait_for
from tests.launch.jobs import submit, wait_for_restart

STEPS = 40


@pytest.fixture
def data(quickstart: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sft.jsonl"
    lines = (quickstart / "sft.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: STEPS * 16]))
    return path


def write_config(data: Path, base: Path, name: str) -> Path:
    values = yaml.safe_load((ROOT / "examples" / "quickstart" / "sft.yaml").read_text())
    values |= {"run_dir": str(data.with_name(name)), "epochs": 1, "batch_size": 16, "save_every": 4}
    values |= {"watchdog_s": 30}
    values["policy"]["path"] = str(base)
    values["data"]["path"] = str(data)
    values["launch"] = {"verb": "sft", "nodes": 2, "cpus_per_rank": 1, "time": "00:30:00"}
    path = data.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def losses(run_dir: Path) -> list[float]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [row["train/loss"] for row in read_rows(path)] if text.endswith("\n") else []


def trainer(run_dir: Path, rank: int) -> psutil.Process:
    """The process of a rank of the job."""
    ours = str(run_dir / "launch")
    found: list[Any] = []
    for one in psutil.process_iter(["cmdline", "create_time"]):
        words = one.info["cmdline"] or []
        of_the_run = "klear_megatron" in words and any(word.startswith(ours) for word in words)
        if of_the_run and one.environ()["RANK"] == str(rank):
            found.append(one)
    return min(found, key=lambda one: one.info["create_time"])  # others are its forks


def wait_for_a_new_step(run_dir: Path, unless: Callable[[], bool] = lambda: False) -> None:
    begun = len(losses(run_dir))
    wait_for(lambda: len(losses(run_dir)) > begun or unless(), 240)


def let_time_run_out(job: str, run_dir: Path, log: Path) -> None:
    """Has Slurm see a near time limit while the run trains.

    Slurm looks at time limits every 30 seconds; a rank that is stopped again and again lets the
    steps last till then.
    """

    def told() -> bool:
        return "told to end" in log.read_text()

    rank = trainer(run_dir, 1)
    set_time_limit(job, "00:05:00")  # grace_s
    while not told():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.suspend()
            time.sleep(5)
            rank.resume()
        wait_for_a_new_step(run_dir, unless=told)
    set_time_limit(job, "00:30:00")


def set_time_limit(job: str, limit: str) -> None:
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={limit}"], check=True)


def test_a_trainer_that_is_killed_hangs_and_runs_out_of_time_has_the_losses_of_one_left_alone(
    slurm_conf, beside_the_pipeline, quickstart, data, tmp_path
):
    alone = write_config(data, quickstart / "base", "alone")
    config, run_dir = write_config(data, quickstart / "base", "hit"), tmp_path / "hit"
    prepared = run_command("launch", str(config), "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    job = submit(Path(prepared.stdout.strip().splitlines()[-1]) / "job.sh")
    log = run_dir / "launch" / f"{job}.log"

    wait_for(lambda: len(losses(run_dir)) > 4, 240)
    trainer(run_dir, 0).kill()
    wait_for_restart(job, run_dir, 1)

    wait_for_a_new_step(run_dir)
    trainer(run_dir, 1).suspend()
    assert run_command("sft", str(alone), ranks=2).returncode == 0  # meanwhile
    expected = losses(tmp_path / "alone")
    assert len(expected) == STEPS
    wait_for(lambda: "no rank has made progress for 30 s" in log.read_text(), 120)
    for rank in range(2):
        report = (run_dir / "hang" / f"rank_{rank:05}.txt").read_text()
        assert "klear_megatron/sft/loop.py" in report
    # It may have been stopped in a save, which follows every fourth step.
    assert re.search(
        r"last progress: \d+ s ago, phase (train|save) after step \d+", status(run_dir)
    )
    wait_for(lambda: "PENDING" in status(run_dir))
    wait_for_restart(job, run_dir, 2)

    wait_for_a_new_step(run_dir)
    assert "RUNNING" in status(run_dir)
    let_time_run_out(job, run_dir, log)
    wait_for_restart(job, run_dir, 3)
    logs = [one.read_text() for one in run_dir.glob(f"launch/{job}-2/trainer-*.log")]
    assert [bool(re.search(r"told to stop: step \d+ is saved", one)) for one in logs] == [True] * 2
    wait_for(lambda: "finished" in log.read_text(), 240)
    assert log.read_text().count("trying again after this error:") == 2
    assert "told to end; goes on from the newest checkpoint" in log.read_text()
    assert losses(run_dir) == expected
