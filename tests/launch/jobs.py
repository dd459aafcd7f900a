"""Jobs whose tasks run a few lines of Python, on the local Slurm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from klear_megatron.config import Section, load_config
from klear_megatron.launch.config import LaunchConfig
from klear_megatron.launch.job import Job
from klear_megatron.launch.snapshot import write_snapshot
from klear_megatron.rl.config import RLConfig
from tests.commands import ROOT
from tests.launch.conftest import wait_for

FIRST_NODE = {"nodes": 1, "sbatch_flags": ("--nodelist=node1",)}
FIRST_NODES = {"nodes": 2, "sbatch_flags": ("--nodelist=node1,node2",)}


def write_job(
    run_dir: Path, code: str, *arguments: str, config: Section | None = None, **launch: Any
) -> Job:
    """Writes a job whose ranks run Python code."""
    settings = {"verb": "sft", "nodes": 2, "cpus_per_rank": 1, "time": "00:30:00"} | launch
    if config is None:
        config, settings = Section(), settings | {"run_dir": run_dir}
    job = Job(LaunchConfig(**settings), config, run_dir / "launch" / "snapshots" / "1", ROOT)
    write_snapshot(job)
    edit_job(job, "main", code, *arguments)
    return job


def edit_job(job: Job, step: str, code: str, *arguments: str) -> None:
    """Has the tasks of a step run Python code."""
    path = job.snapshot / "job.json"
    values = json.loads(path.read_text())
    values[step]["command"] = [sys.executable, "-c", code, *arguments]
    path.write_text(json.dumps(values))


def queue() -> set[str]:
    """The jobs that wait or run."""
    return set(subprocess.check_output(["squeue", "--noheader", "--format=%A"], text=True).split())


def submit(script: Path) -> str:
    answer = subprocess.run(
        ["sbatch", "--parsable", str(script)], check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def run_to_end(script: Path) -> tuple[int, list[str]]:
    """The job's exit code, and the lines of its log."""
    # Not sbatch --wait, which looks only after 2, 6 and 14 seconds.
    job = submit(script)
    show = ["scontrol", "--oneliner", "show", "job", job]

    def ended() -> re.Match[str] | None:
        said = subprocess.check_output(show, text=True)
        return re.search(r"JobState=(?:COMPLETED|FAILED) .* ExitCode=(\d+):", said)

    wait_for(ended, 120)
    found = ended()
    assert found is not None
    return int(found[1]), (script.parents[2] / f"{job}.log").read_text().splitlines()


def processes_with(word: str) -> list[Any]:
    """The processes that have this word in their command line."""
    all_of_them = psutil.process_iter(["cmdline"])
    return [one for one in all_of_them if word in (one.info["cmdline"] or [])]


def wait_for_restart(job: str, run_dir: Path, number: int) -> None:
    """Has a requeued job start at once."""

    def restarted() -> bool:
        # Slurm lets a requeued job wait for two minutes; it sets that time after the state.
        command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(command, capture_output=True, check=False)
        return (run_dir / "launch" / f"{job}-{number}").exists()

    wait_for(restarted, 200)


def write_waiting_job(
    run_dir: Path, code: str = "import time; time.sleep(300)", *arguments: str, **servers: Any
) -> Job:
    """Writes a job whose server never answers."""
    paper = ROOT / "examples" / "klear_reasoner_8b" / "math_rl.yaml"
    config = load_config(RLConfig, paper, [f"--run_dir={run_dir}"])
    servers |= {"nodes": 1}
    flags = FIRST_NODES | {"nodes": 1}
    job = write_job(run_dir, "pass", config=config, verb="rl", servers=servers, **flags)
    edit_job(job, "servers", code, *arguments)
    return job


def start_role(run_dir: Path, folder: Path, before: str = "") -> subprocess.Popen[bytes]:
    """Runs the task of a server, outside of Slurm. `before` is Python that it executes first."""
    job = write_waiting_job(run_dir)
    (folder / "ended").mkdir()
    (folder / "attempt.json").write_text(json.dumps({"addresses": {"here": "127.0.0.1"}}))
    code = f"{before}\nimport sys; from klear_megatron.launch import role; sys.exit(role.main())"
    names = {"PROCID": "0", "LOCALID": "0", "NTASKS": "1", "TASKS_PER_NODE": "1"}
    values = {f"SLURM_{name}": value for name, value in names.items()}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(job.snapshot / "job.json"), "server", str(folder)],
        env={**os.environ, **values, "SLURMD_NODENAME": "here"},
        cwd=ROOT,
    )


def outcomes(run_dir: Path) -> list[dict[str, Any]]:
    """How the attempts of a run have ended."""
    return [json.loads(file.read_text()) for file in run_dir.glob("launch/*/outcome.json")]


def nemo_run(*folders: Path) -> None:
    """Submits jobs through the real nemo-run."""
    python = str(ROOT / ".venv-launch" / "bin" / "python")
    command = [python, "-m", "klear_megatron.launch.nemo", "slurm", *map(str, folders)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=100)
