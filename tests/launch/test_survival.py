"""A trainer on a real Slurm that is killed, and told to end, has the losses of one left alone."""

import subprocess
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.commands import ROOT, prepare_quickstart, run_command
from tests.files import read_rows
from tests.launch.test_conductor import submit, wait_for

STEPS = 60


def write_config(folder: Path, name: str) -> Path:
    values = yaml.safe_load((ROOT / "examples" / "quickstart" / "sft.yaml").read_text())
    values |= {"run_dir": str(folder / name), "epochs": 1, "batch_size": 16, "save_every": 4}
    values["policy"]["path"] = str(folder / "base")
    values["data"]["path"] = str(folder / "sft.jsonl")
    values["launch"] = {"verb": "sft", "nodes": 2, "cpus_per_rank": 1, "time": "00:30:00"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(run_dir: Path) -> list[float]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [row["train/loss"] for row in read_rows(path)] if text.endswith("\n") else []


def trainers(config: Path) -> list[psutil.Process]:
    """The processes of the ranks of the job, oldest first."""
    ours = str(config.parent / "killed" / "launch")
    found: list[Any] = []
    for one in psutil.process_iter(["cmdline", "create_time"]):
        words = one.info["cmdline"] or []
        if "klear_megatron" in words and any(word.startswith(ours) for word in words):
            found.append(one)
    return sorted(found, key=lambda one: one.info["create_time"])


def test_a_trainer_that_is_killed_and_told_to_end_has_the_losses_of_one_left_alone(
    slurm_conf, tmp_path
):
    prepare_quickstart(tmp_path)
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[: STEPS * 16]))
    alone = write_config(tmp_path, "alone")
    assert run_command("sft", str(alone), ranks=2).returncode == 0
    expected = losses(tmp_path / "alone")
    assert len(expected) == STEPS

    config, run_dir = write_config(tmp_path, "killed"), tmp_path / "killed"
    prepared = run_command("launch", str(config), "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    job = submit(Path(prepared.stdout.strip().splitlines()[-1]) / "job.sh")
    log = run_dir / "launch" / f"{job}.log"

    def requeued(attempts: int) -> bool:
        # Slurm lets a requeued job wait for two minutes; it sets that time after the state.
        command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(command, capture_output=True, check=False)
        return (run_dir / "launch" / f"{job}-{attempts}").exists()

    wait_for(lambda: len(losses(run_dir)) > 4, 240)
    trainers(config)[0].kill()  # later ones may be forks that write a checkpoint
    wait_for(lambda: requeued(1), 200)
    before = len(losses(run_dir))
    wait_for(lambda: len(losses(run_dir)) > before or "finished" in log.read_text(), 240)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    wait_for(lambda: requeued(2), 200)
    wait_for(lambda: "finished" in log.read_text(), 240)
    assert "trying again after this error:" in log.read_text()
    assert "told to end; goes on from the newest checkpoint" in log.read_text()
    assert losses(run_dir) == expected
