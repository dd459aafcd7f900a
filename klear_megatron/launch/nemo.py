"""Submits rendered jobs with nemo-run, from the environment that has it.

    .venv-launch/bin/python -m klear_megatron.launch.nemo SNAPSHOT slurm|local

For recipes of your own: `prepare` renders a config, `executor` and `task` are what
`run.Experiment.add` takes, and `add` adds a job with its continuations. See examples/slurm/.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def prepare(
    config: str | Path,
    *overrides: str,
    site: str | Path | None = None,
    python: str | Path = ".venv/bin/python",
) -> Path:
    """Checks a run's config, and writes the files of its job without submitting it.

    Args:
        overrides: `--section.key=value`, as on the command line.
        python: interpreter of the package's environment on this host.

    Returns:
        the snapshot's folder.

    Raises:
        SystemExit: the config or the site file is refused; the reason is on standard error.
    """
    flags = ["--site", str(site)] if site is not None else []
    command = [str(python), "-m", "klear_megatron", "launch", str(config), "--prepare", *flags]
    answer = subprocess.run([*command, *overrides], stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.returncode)
    return Path(answer.stdout.splitlines()[-1])


def slurm_executor(snapshot: Path, *, dependency_type: str = "afterok") -> Any:
    """A `run.SlurmExecutor` with the job's flags, which runs the job's own script."""
    import nemo_run as run

    job = _read(snapshot)
    components = [dict(component) for component in job["header"]]
    size = {"nodes", "ntasks-per-node", "gpus-per-node"}
    executors = [
        run.SlurmExecutor(
            account=component.pop("account", None),
            job_name_prefix=job["name"] + "-",  # by default the account, which may be missing
            nodes=int(component["nodes"]),
            ntasks_per_node=int(component["ntasks-per-node"]),
            gpus_per_node=int(component["gpus-per-node"]) if "gpus-per-node" in component else None,
            time=component.pop("time"),
            tunnel=run.LocalTunnel(job_dir=""),
            packager=run.Packager(),
            heterogeneous=len(components) > 1,
            dependency_type=dependency_type,
            poll_estimated_start_time=False,
            # The script ends the shell, so nemo-run's own srun is not reached: it would give all
            # steps one layout, and end them with SIGKILL.
            setup_lines=f"exec bash {shlex.quote(str(snapshot / 'job.sh'))}",
            additional_parameters={
                name.replace("-", "_"): True if value is None else value
                for name, value in component.items()
                if name not in size
            },
        )
        for component in components
    ]
    return executors if len(executors) > 1 else executors[0]


def local_executor() -> Any:
    """A `run.LocalExecutor`: the job runs on this host."""
    import nemo_run as run

    return run.LocalExecutor(packager=run.Packager())


def task(snapshot: Path) -> Any:
    """The job's script as a `run.Script`."""
    import nemo_run as run

    return run.Script(path=str(snapshot / "job.sh"))


def add(experiment: Any, snapshot: Path, *, after: str | None = None, local: bool = False) -> str:
    """Adds a job and its continuations to an experiment.

    Args:
        after: id of a job of this experiment that has to end well first.

    Returns:
        the id of the last continuation, which ends well only when the run is finished.
    """
    job = _read(snapshot)
    last, kind = after, "afterok"
    for index in range(1 + (0 if local else job["continuations"])):
        executor = local_executor() if local else slurm_executor(snapshot, dependency_type=kind)
        tasks = [task(snapshot)] * len(executor) if isinstance(executor, list) else task(snapshot)
        name = f"{job['name']}-{index}" if index else job["name"]
        last = experiment.add(
            tasks, executor=executor, name=name, dependencies=[last] if last else None
        )
        kind = "afterany"
    assert last is not None
    return last


def submit(snapshots: Sequence[Path], name: str, *, local: bool = False) -> None:
    """Runs jobs as one experiment, each after the one before it has ended well."""
    import nemo_run as run

    with run.Experiment(name) as experiment:
        last = None
        for snapshot in snapshots:
            last = add(experiment, snapshot, after=last, local=local)
        # Slurm has the dependencies, so nothing has to stay here.
        experiment.run(detach=not local, sequential=local, tail_logs=local)


def _read(snapshot: Path) -> dict[str, Any]:
    job: dict[str, Any] = json.loads((snapshot / "job.json").read_text(encoding="utf-8"))
    return job


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        submit([folder], _read(folder)["name"], local=sys.argv[2] == "local")
    except Exception as error:  # of any of nemo-run's schedulers and tunnels
        sys.exit(f"nemo-run: {error}")
