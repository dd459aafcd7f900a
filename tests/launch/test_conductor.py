"""Jobs on a real Slurm end, go on and say why, whatever happens to their processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from klear_megatron.launch.config import CommandConfig, LaunchConfig
from klear_megatron.launch.job import Job
from klear_megatron.launch.snapshot import write_snapshot
from klear_megatron.launch.status import cancel, status
from tests.commands import ROOT

ODD = ["two words", "it's", 'a "quote"', "$HOME `id`", "two\nlines", ""]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "a run's folder"


@pytest.fixture
def make_job(slurm_conf: Path, run_dir: Path) -> Iterator[Callable[..., Path]]:
    """Writes a job whose ranks run Python code, and returns its script. Leaves no job behind."""

    def make(code: str, *arguments: str, **launch: Any) -> Path:
        settings = {"verb": "sft", "nodes": 2, "cpus_per_rank": 1, "time": "00:30:00"} | launch
        snapshot = run_dir / "launch" / "snapshots" / "1"
        job = Job(LaunchConfig(**settings), CommandConfig(run_dir=run_dir), snapshot, ROOT)
        script = write_snapshot(job)
        values = job.data()
        values["main"]["command"] = [sys.executable, "-c", code, *arguments]
        (snapshot / "job.json").write_text(json.dumps(values))
        return script

    yield make
    while jobs := subprocess.check_output(["squeue", "--noheader", "--format=%A"], text=True):
        subprocess.run(["scancel", *jobs.split()], check=True)
        time.sleep(0.3)


def submit(script: Path) -> str:
    answer = subprocess.run(
        ["sbatch", "--parsable", str(script)], check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


def run_to_end(script: Path) -> tuple[int, list[str]]:
    """The job's exit code, and the lines of its log."""
    answer = subprocess.run(["sbatch", "--wait", str(script)], timeout=120, check=False)
    log = max(script.parents[2].glob("*.log"), key=lambda log: int(log.stem))
    return answer.returncode, log.read_text().splitlines()


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_values_reach_every_rank_as_they_are_written(make_job, run_dir, tmp_path):
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'Mixed_Case')\n"
        "values = [sys.argv[2:], *(os.environ[name] for name in names)]\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(values))"
    )
    script = make_job(
        code, str(tmp_path), *ODD, ranks_per_node=2, environment={"Mixed_Case": "\n".join(ODD)}
    )
    exit_code, lines = run_to_end(script)
    assert exit_code == 0, lines
    for rank in range(4):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == [ODD, str(rank), "4", str(rank % 2), "2", "\n".join(ODD)]
    assert (script.parent / "finished").exists()


def test_a_killed_rank_ends_the_job_and_is_named(make_job):
    code = (
        "import os, time\n"
        "if os.environ['RANK'] == '1': print('last words', flush=True); os.kill(os.getpid(), 9)\n"
        "time.sleep(300)"
    )
    begin = time.monotonic()
    exit_code, lines = run_to_end(make_job(code, requeue=False))
    assert time.monotonic() - begin < 45
    assert exit_code == 1
    assert lines[-1].startswith("error: trainer on node2, rank 1, ended with code -9")
    assert "killed by SIGKILL" in lines[-1]
    assert "last words" in lines[-1]


def test_the_first_error_is_ours_and_bad_input_is_not_tried_again(make_job):
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': raise RuntimeError('connection closed by peer')\n"
        "time.sleep(1); sys.exit(print('error: no such data', file=sys.stderr) or 2)"
    )
    script = make_job(code)
    exit_code, lines = run_to_end(script)
    assert exit_code == 2
    assert lines[-1] == "error: trainer on node2, rank 1, ended with code 2: no such data"
    exit_code, lines = run_to_end(script)  # as a continuation would
    assert exit_code == 1
    assert "not tried again" in lines[-1]


def test_a_killed_srun_ends_the_job_and_is_named(make_job, run_dir):
    job = submit(make_job("import time; time.sleep(300)", requeue=False))
    log = run_dir / "launch" / f"{job}.log"
    wait_for(lambda: list(run_dir.glob("launch/*/trainer-*.log")))

    def sruns() -> list[psutil.Process]:
        all_of_them = psutil.process_iter(["name", "cmdline"])
        ours = f"{run_dir}/launch/snapshots/1/job.json"
        commands = [(one, one.info["cmdline"] or []) for one in all_of_them]
        return [one for one, words in commands if words[:1] == ["srun"] and ours in words]

    os.kill(sruns()[0].pid, signal.SIGKILL)
    begin = time.monotonic()
    wait_for(lambda: "error:" in log.read_text())
    assert time.monotonic() - begin < 20
    message = log.read_text().partition("error:")[2]
    assert "the srun of trainer was ended from outside" in message
    assert "killed by SIGKILL" in message


def test_a_job_that_was_told_to_end_goes_on_after_a_requeue(make_job, run_dir, tmp_path):
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "if Path(sys.argv[1]).exists(): sys.exit(0)\n"
        "time.sleep(300)"
    )
    again = tmp_path / "again"
    script = make_job(code, str(again))
    job = submit(script)
    wait_for(lambda: len(list(run_dir.glob(f"launch/{job}-0/trainer-*.log"))) == 2)
    time.sleep(1)  # until the ranks have their handlers
    assert "RUNNING" in status(run_dir)
    again.touch()
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    log = run_dir / "launch" / f"{job}.log"
    wait_for(lambda: "told to end; goes on" in log.read_text())
    wait_for(lambda: "PENDING" in status(run_dir))

    def finished_without_the_wait() -> bool:
        # Slurm lets a requeued job wait for two minutes; it sets that time after the state.
        command = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(command, capture_output=True, check=False)
        return (script.parent / "finished").exists()

    wait_for(finished_without_the_wait, timeout=200)
    assert (run_dir / "launch" / f"{job}-1" / "outcome.json").exists()


def test_a_cancelled_job_ends(make_job, run_dir):
    job = submit(make_job("import time; time.sleep(300)"))
    wait_for(lambda: list(run_dir.glob("launch/*/trainer-*.log")))
    assert job in cancel(run_dir)
    wait_for(lambda: "no job is waiting or running" in status(run_dir) or job in status(run_dir))
    wait_for(lambda: job not in subprocess.check_output(["squeue"], text=True))
    assert cancel(run_dir) == "no job is waiting or running"


def test_an_allocation_that_is_too_small_is_refused(make_job):
    script = make_job("pass")
    text = script.read_text().replace("--nodes=2", "--nodes=1")
    script.write_text(text)
    exit_code, lines = run_to_end(script)
    assert exit_code == 2
    assert lines[-1] == "error: the job has 1 nodes, but its layout needs 2"
