"""The verb `launch` of the command line."""

import argparse
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klear_megatron.config import Section
from klear_megatron.config.loading import LAUNCH, validate
from klear_megatron.config.reading import apply_overrides, read_values
from klear_megatron.errors import UserError
from klear_megatron.launch.config import PACKAGE_PARENT, LaunchConfig, SiteConfig

if TYPE_CHECKING:
    from klear_megatron.launch.job import Job


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Adds the arguments of `launch`."""
    verb.add_argument(
        "configs",
        type=Path,
        nargs="+",
        metavar="config",
        help="YAML file with a `launch:` section; of several files, each is a job that starts when "
        "the one before it has ended well",
    )
    verb.add_argument("--site", type=Path, help="YAML file with what the cluster asks for")
    verb.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    verb.add_argument(
        "--array", action="store_true", help="run the files as the tasks of one array job, at once"
    )
    what = verb.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the script and the layout, and write nothing"
    )
    what.add_argument(
        "--prepare", action="store_true", help="write the job's files and print their folder"
    )
    verb.epilog = (
        "The keys of both files are described in klear_megatron/launch/config.py; docs/slurm.md "
        "goes through them. Any key of the run can be set with --section.key value."
    )


def launch(arguments: argparse.Namespace, configs: Mapping[str, type[Section]]) -> None:
    """Checks the configs of one or several jobs, and submits them.

    Args:
        configs: verb -> the class of its config, for the verbs that take a YAML file.

    Raises:
        UserError: a config or a site file that is refused, a layout that does not fit the nodes, a
            missing secret, no nemo-run, or a job that Slurm refuses. Then nothing is submitted.
    """
    # Here, as they import torch, which the other verbs' parsers must not wait for.
    from klear_megatron.launch.array import array_script, write_array
    from klear_megatron.launch.layout import describe_layout
    from klear_megatron.launch.snapshot import write_snapshot

    jobs = [job for path in arguments.configs for job in read_jobs(arguments, path, configs)]
    arrays = _arrays(jobs, arguments)
    _check(jobs, arguments)
    if arguments.dry_run:
        own = [line for job in jobs for line in [job.script(), *describe_layout(job)]]
        print("\n".join([*map(array_script, arrays), *own]))
        return
    for job in jobs:
        write_snapshot(job)
    folders = [write_array(array) for array in arrays] or [job.snapshot for job in jobs]
    if arguments.prepare:
        print("\n".join(map(str, folders)))
        return
    # Jobs start one after the other, and arrays at once.
    for together in [[folder] for folder in folders] if arrays else [folders]:
        _submit(jobs[0].launch.nemo_run_python, together, arguments.executor)
    for job in jobs:
        print(f"`klear-megatron status {job.run_dir}` shows what it does")


def read_jobs(
    arguments: argparse.Namespace, path: Path, configs: Mapping[str, type[Section]]
) -> Sequence["Job"]:
    """The job that a file, the site file and the command line describe; or those of the points of a
    scaling experiment."""
    from klear_megatron.launch.job import Job, run_dir_of
    from klear_megatron.launch.points import point_jobs
    from klear_megatron.launch.snapshot import snapshot_path
    from klear_megatron.scaling.config import ScalingConfig

    values = apply_overrides(read_values(path), arguments.overrides)
    section = values.pop(LAUNCH, None)
    if not isinstance(section, dict):
        raise UserError(
            f"{path}: has no `launch:` section; add one with at least `verb: rl` (or another "
            "verb); docs/slurm.md describes it"
        )
    site: dict[str, Any] = {}
    if arguments.site is not None:
        site = read_values(arguments.site)
        validate(SiteConfig, site, f"{arguments.site}:")
    both = site | section
    both["environment"] = {**site.get("environment", {}), **(section.get("environment") or {})}
    launch_config = validate(LaunchConfig, both, f"launch: of {path}:")
    config_class = configs.get(launch_config.verb, Section)
    config = validate(config_class, values, f"{path} with the command line's values:")
    if isinstance(config, ScalingConfig):
        return point_jobs(launch_config, config)
    snapshot = snapshot_path(run_dir_of(launch_config, config))
    return [Job(launch_config, config, snapshot, Path.cwd(), arguments.executor == "local")]


def _arrays(jobs: Sequence["Job"], arguments: argparse.Namespace) -> Sequence[Sequence["Job"]]:
    """The jobs by the array that they are tasks of; empty if they are no tasks."""
    from klear_megatron.launch.array import array_header
    from klear_megatron.launch.points import by_size

    scaling = any(job.launch.verb == "scaling" for job in jobs)
    if scaling and len(arguments.configs) > 1:
        raise UserError("scaling: an experiment is an array by itself; launch the files apart")
    arrays = by_size(jobs) if scaling else [jobs] if arguments.array else []
    for array in arrays:
        array_header(array)
    if arrays and arguments.executor == "local":
        raise UserError(
            "--executor local: only Slurm has arrays; leave out --array to run one after the "
            "other, or use `klear-megatron scaling`"
        )
    return arrays


def _check(jobs: Sequence["Job"], arguments: argparse.Namespace) -> None:
    """Checks every job, so that none is submitted before all are found good."""
    run_dirs: set[Path] = set()
    for job in jobs:
        job.check()
        for name in job.launch.secrets:
            if name not in os.environ and not arguments.dry_run:
                raise UserError(f"launch.secrets: {name} is not set in your shell; export it first")
        if job.run_dir in run_dirs:
            raise UserError(
                f"two files have the same run directory, {job.run_dir}; give each one of its own"
            )
        run_dirs.add(job.run_dir)


def _submit(python: Path, folders: Sequence[Path], executor: str) -> None:
    names = [str(folder) for folder in folders]
    if not python.is_file():
        raise UserError(
            f"launch.nemo_run_python: {python} does not exist; `make setup-launch` installs "
            f"nemo-run, or submit job.sh yourself with sbatch, from {', '.join(names)}"
        )
    command = [str(python), "-m", "klear_megatron.launch.nemo", executor, *names]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    answer = subprocess.run(command, env=environment, check=False)
    if answer.returncode:
        what = "not finished" if executor == "local" else "not submitted"
        raise UserError(f"{what} (see above); the files are in {', '.join(names)}")
