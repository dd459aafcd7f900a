"""Several runs as one array job of Slurm: its task number picks the run."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.launch.job import Flags, Job, sbatch_lines
from klear_megatron.platform.files import make_folder

_OWN = ("job-name", "output")
"""Flags that differ from run to run without harm."""


def array_header(jobs: Sequence[Job]) -> Flags:
    """The flags of sbatch that all tasks of the array have.

    Raises:
        UserError: the runs ask for different jobs, or for what an array cannot have.
    """
    for job in jobs:
        for setting in ("heterogeneous", "continuations", "singleton"):
            if getattr(job.launch, setting):
                raise UserError(
                    f"--array: {job.name}: an array cannot have launch.{setting}; leave it out"
                )
        for flag in sorted({*jobs[0].header()[0], *job.header()[0]} - {*_OWN}):
            first, other = (one.header()[0].get(flag, "not set") for one in (jobs[0], job))
            if first != other:
                raise UserError(
                    f"--array: {jobs[0].name} and {job.name} ask for different jobs: --{flag} is "
                    f"{first} and {other}; launch them apart"
                )
    own = {"output": str(array_folder(jobs) / "%A_%a.log"), "array": f"0-{len(jobs) - 1}"}
    return jobs[0].header()[0] | own


def array_folder(jobs: Sequence[Job]) -> Path:
    """The folder of the array's own files."""
    return jobs[0].snapshot / "array"


def array_script(jobs: Sequence[Job]) -> str:
    """The script for sbatch. Each task writes its log where a job of its own would."""
    snapshots = " ".join(shlex.quote(str(job.snapshot)) for job in jobs)
    return (
        f"#!/bin/bash\n{sbatch_lines([array_header(jobs)])}snapshots=({snapshots})\n"
        "snapshot=${snapshots[$SLURM_ARRAY_TASK_ID]}\n"
        'exec bash "$snapshot/job.sh" '
        '>>"$snapshot/../../${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.log" 2>&1\n'
    )


def write_array(jobs: Sequence[Job]) -> Path:
    """Writes the array's script, and into each run's snapshot which task it is.

    Returns:
        the array's folder, which is submitted as a snapshot is.
    """
    folder = array_folder(jobs)
    make_folder(folder)
    job = {"name": jobs[0].name, "header": [array_header(jobs)], "continuations": 0}
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    (folder / "job.sh").write_text(array_script(jobs), encoding="utf-8")
    for index, one in enumerate(jobs):
        place = json.dumps({"folder": str(folder), "index": index})
        (one.snapshot / "array.json").write_text(place, encoding="utf-8")
    return folder
