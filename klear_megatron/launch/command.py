"""The verb `launch` of the command line."""

import argparse
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klear_megatron.config import Section
from klear_megatron.config.loading import LAUNCH, validate
from klear_megatron.config.reading import apply_overrides, read_values
from klear_megatron.errors import UserError
from klear_megatron.launch.config import PACKAGE_PARENT, CommandConfig, LaunchConfig, SiteConfig

if TYPE_CHECKING:
    from klear_megatron.launch.job import Job


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Adds the arguments of `launch`."""
    verb.add_argument("config", type=Path, help="YAML file of a run, with a `launch:` section")
    verb.add_argument("--site", type=Path, help="YAML file with what the cluster asks for")
    verb.add_argument("--executor", choices=("slurm", "local"), default="slurm")
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
    """Checks a run's config and submits it.

    Args:
        configs: verb -> the class of its config, for the verbs that take a YAML file.

    Raises:
        UserError: a config or a site file that is refused, a layout that does not fit the nodes, a
            missing secret, no nemo-run, or a job that Slurm refuses.
    """
    # Here, as they import torch, which the other verbs' parsers must not wait for.
    from klear_megatron.launch.layout import describe_layout
    from klear_megatron.launch.snapshot import write_snapshot

    job = read_job(arguments, configs)
    job.check()
    for name in job.launch.secrets:
        if name not in os.environ and not arguments.dry_run:
            raise UserError(f"launch.secrets: {name} is not set in your shell; export it first")
    if arguments.dry_run:
        print("\n".join([job.script(), *describe_layout(job)]))
        return
    script = write_snapshot(job)
    if arguments.prepare:
        print(job.snapshot)
        return
    _submit(job, script, arguments.executor)


def read_job(arguments: argparse.Namespace, configs: Mapping[str, type[Section]]) -> "Job":
    """The job that the files and the command line describe."""
    from klear_megatron.launch.job import Job
    from klear_megatron.launch.snapshot import snapshot_path

    values = apply_overrides(read_values(arguments.config), arguments.overrides)
    section = values.pop(LAUNCH, None)
    if not isinstance(section, dict):
        raise UserError(
            f"{arguments.config}: has no `launch:` section; add one with at least `verb: rl` (or "
            "another verb); docs/slurm.md describes it"
        )
    site: dict[str, Any] = {}
    if arguments.site is not None:
        site = read_values(arguments.site)
        validate(SiteConfig, site, f"{arguments.site}:")
    both = site | section
    both["environment"] = {**site.get("environment", {}), **(section.get("environment") or {})}
    launch_config = validate(LaunchConfig, both, f"launch: of {arguments.config}:")
    config_class = configs.get(launch_config.verb, CommandConfig)
    title = f"{arguments.config} with the command line's values:"
    config = validate(config_class, values, title)
    run_dir = Path(getattr(config, "run_dir"))  # noqa: B009
    return Job(
        launch_config,
        config,
        snapshot_path(run_dir),
        Path.cwd(),
        local=arguments.executor == "local",
    )


def _submit(job: "Job", script: Path, executor: str) -> None:
    python = job.launch.nemo_run_python
    if not python.is_file():
        raise UserError(
            f"launch.nemo_run_python: {python} does not exist; `make setup-launch` installs "
            f"nemo-run, or submit the job yourself: sbatch {script}"
        )
    command = [str(python), "-m", "klear_megatron.launch.nemo", str(job.snapshot), executor]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    answer = subprocess.run(command, env=environment, check=False)
    if answer.returncode:
        raise UserError(f"the job was not submitted (see above); its files are in {job.snapshot}")
    print(f"`klear-megatron status {job.run_dir}` shows what it does; its files: {job.snapshot}")
