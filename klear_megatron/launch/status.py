"""What a launched run does, from the files of its run directory and from squeue."""

import json
import re
import subprocess
import time
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.launch.reports import first_failure, read_reports
from klear_megatron.platform.exit_codes import CONTINUE, FINISHED

_LINES = 10
_ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
)
"""States of jobs that have ended and that Slurm still remembers."""


def status(run_dir: Path) -> str:
    """The jobs of a run, its newest attempt, what the trainer does, the first error of all ranks,
    and the newest lines.

    Raises:
        UserError: nothing was launched with this run directory.
    """
    folder = _launch_folder(run_dir)
    lines = [f"job {job}: {state}" for job, state in _jobs(run_dir).items()]
    lines = lines or ["no job is waiting or running"]
    attempt = _newest_attempt(folder)
    if attempt is None:
        return "\n".join([*lines, "no job has started yet"])
    lines.append(f"newest attempt: {attempt}")
    outcome = attempt / "outcome.json"
    if outcome.exists():
        told = json.loads(outcome.read_text())
        kind = {FINISHED: "finished", CONTINUE: "told to end, to be continued"}.get(
            told["code"], "failed"
        )
        lines.append(f"it ended: {kind}")
    heartbeat = run_dir / "heartbeat.json"
    if heartbeat.exists():
        last = json.loads(heartbeat.read_text())
        ago = max(0.0, time.time() - last["time"])
        lines.append(
            f"last progress: {ago:.0f} s ago, phase {last['phase']} after step {last['step']}"
        )
    if first := first_failure(read_reports(attempt)):
        lines.append(f"first error: {first}")
    newest = max(attempt.glob("*.log"), key=lambda log: log.stat().st_mtime, default=None)
    if newest is not None:
        lines += [f"the end of {newest}:", *_tail(newest)]
    return "\n".join(lines)


def logs(run_dir: Path) -> str:
    """The last lines of every log of the newest attempt.

    Raises:
        UserError: nothing was launched with this run directory, or no job has started.
    """
    attempt = _newest_attempt(_launch_folder(run_dir))
    if attempt is None:
        raise UserError(f"{run_dir}: no job has started yet; `klear-megatron status` shows them")
    lines = []
    for log in sorted(attempt.glob("*.log")):
        lines += [f"==> {log}", *_tail(log)]
    return "\n".join(lines)


def cancel(run_dir: Path) -> str:
    """Cancels the jobs of a run that wait or run.

    Raises:
        UserError: nothing was launched with this run directory, or scancel failed.
    """
    _launch_folder(run_dir)
    jobs = list(_jobs(run_dir))
    if not jobs:
        return "no job is waiting or running"
    answer = subprocess.run(
        ["scancel", *jobs],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        raise UserError(f"scancel {' '.join(jobs)}: {answer.stderr.strip()}")
    return f"cancelled {', '.join(jobs)}"


def _launch_folder(run_dir: Path) -> Path:
    folder = run_dir / "launch"
    if not folder.is_dir():
        raise UserError(f"{run_dir}: nothing was launched with this run directory")
    return folder


def _newest_attempt(folder: Path) -> Path | None:
    newest = folder / "newest"
    return folder / newest.read_text() if newest.exists() else None


def _jobs(run_dir: Path) -> dict[str, str]:
    """Job -> state and reason, of the jobs of a run that wait or run.

    Needs no accounting. Without Slurm on this host there are none.
    """
    try:
        answer = subprocess.run(
            ["scontrol", "--oneliner", "show", "job"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError:
        return {}
    except subprocess.CalledProcessError as error:
        raise UserError(f"scontrol: {error.stderr.strip()}") from error
    places = _places(run_dir)
    found = {}
    for line in answer.stdout.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        log = re.search(r" StdOut=(.*?)( \w+=|\s*$)", line)  # a path may have spaces
        if log is None or fields["JobState"] in _ENDED:
            continue
        folder = Path(log[1]).parent
        for index in places.get(folder, ()):
            job, tasks = fields["JobId"], fields.get("ArrayTaskId", "")
            if index is not None:
                job = f"{fields['ArrayJobId']}_{index}"
                if tasks.isdecimal() and int(tasks) != index:
                    continue
            found[job] = f"{fields['JobState']} (reason: {fields['Reason']})"
    return found


def _places(run_dir: Path) -> dict[Path, list[int | None]]:
    """Folders that logs of the run's jobs are in, each with the tasks of an array that are meant;
    None for a job that is no array."""
    launched = run_dir.absolute() / "launch"
    places: dict[Path, list[int | None]] = {launched: [None]}
    for file in (launched / "snapshots").glob("*/array.json"):
        place = json.loads(file.read_text())
        places.setdefault(Path(place["folder"]), []).append(place["index"])
    return places


def _tail(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [f"    {line}" for line in lines[-_LINES:]]
