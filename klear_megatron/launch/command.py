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

    jobs = [read_job(arguments, path, configs) for path in arguments.configs]
    _check(jobs, arguments)
    if arguments.dry_run:
        own = [line for job in jobs for line in [job.script(), *describe_layout(job)]]
        print("\n".join([*([array_script(jobs)] if arguments.array else []), *own]))
        return
    for job in jobs:
        write_snapshot(job)
    folders = [write_array(jobs)] if arguments.array else [job.snapshot for job in jobs]
    if arguments.prepare:
        print("\n".join(map(str, folders)))
        return
    _submit(jobs[0].launch.nemo_run_python, folders, arguments.executor)
    for job in jobs:
        print(f"`klear-megatron status {job.run_dir}` shows what it does")


def read_job(
    arguments: argparse.Namespace, path: Path, configs: Mapping[str, type[Section]]
) -> "Job":
    """The job that a file, the site file and the command line describe."""
    from klear_megatron.launch.job import Job, run_dir_of
    from klear_megatron.launch.snapshot import snapshot_path

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
    return Job(
        launch_config,
        config,
        snapshot_path(run_dir_of(launch_config, config)),
        Path.cwd(),
        local=arguments.executor == "local",
    )


def _check(jobs: Sequence["Job"], arguments: argparse.Namespace) -> None:
    """Checks every job, so that none is submitted before all are found good."""
    from klear_megatron.launch.array import array_header

    if arguments.array and arguments.executor == "local":
        raise UserError("--array: only Slurm has arrays; leave it out to run one after the other")
    config_of: dict[Path, Path] = {}
    for job, path in zip(jobs, arguments.configs, strict=True):
        job.check()
        for name in job.launch.secrets:
            if name not in os.environ and not arguments.dry_run:
                raise UserError(f"launch.secrets: {name} is not set in your shell; export it first")
        if job.run_dir in config_of:
            raise UserError(
                f"{config_of[job.run_dir]} and {path} have the same run directory, {job.run_dir}; "
                "give each one of its own"
            )
        config_of[job.run_dir] = path
    if arguments.array:
        array_header(jobs)


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
