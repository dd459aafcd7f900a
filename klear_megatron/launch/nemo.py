"""Submits rendered jobs with nemo-run, from the environment that has it.

    .venv-launch/bin/python -m klear_megatron.launch.nemo slurm|local SNAPSHOT [SNAPSHOT ...]

For recipes of your own: `prepare` renders configs, `slurm_executor` and `task` are what
`run.Experiment.add` takes, `add` adds a job with its continuations, and `submit` runs a pipeline.
See examples/slurm/.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def prepare(
    *configs: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    site: str | Path | None = None,
    python: str | Path = ".venv/bin/python",
) -> list[Path]:
    """Checks the configs of jobs, and writes the jobs' files without submitting them.

    Args:
        configs: YAML files, or what such a file would hold.
        overrides: `--section.key=value`, as on the command line; they apply to every config.
        python: interpreter of the package's environment on this host.

    Returns:
        the snapshot's folder of each; of a scaling experiment, those of its arrays.

    Raises:
        SystemExit: a config or the site file is refused; the reason is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="klear-megatron-") as folder:
        files = []
        for index, config in enumerate(configs):
            if isinstance(config, Mapping):
                file = Path(folder, f"{index}.yaml")
                file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
                config = file
            files.append(str(config))
        flags = ["--site", str(site)] if site is not None else []
        command = [str(python), "-m", "klear_megatron", "launch", *files, "--prepare", *flags]
        answer = subprocess.run(
            [*command, *overrides], stdout=subprocess.PIPE, text=True, check=False
        )
    if answer.returncode:
        raise SystemExit(answer.returncode)
    return [Path(line) for line in answer.stdout.splitlines()]


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


def add(experiment: Any, snapshot: Path, *, after: str | None = None) -> str:
    """Adds a job and its continuations to an experiment.

    Args:
        after: id of a job of this experiment that has to end well first.

    Returns:
        the id of the last continuation, which ends well only when the run is finished.
    """
    job = _read(snapshot)
    last, kind = after, "afterok"
    # What nemo-run writes takes the place of the header's own.
    also = "singleton," if "dependency" in job["header"][0] else ""
    for index in range(1 + job["continuations"]):
        executor = slurm_executor(snapshot, dependency_type=also + kind)
        tasks = [task(snapshot)] * len(executor) if isinstance(executor, list) else task(snapshot)
        name = f"{job['name']}-{index}" if index else job["name"]
        last = experiment.add(
            tasks, executor=executor, name=name, dependencies=[last] if last else None
        )
        kind = "afterany"
    assert last is not None
    return last


def submit(snapshots: Sequence[Path], name: str) -> None:
    """Submits jobs to Slurm as one experiment, each after the one before it has ended well."""
    import nemo_run as run

    with run.Experiment(name) as experiment:
        last = None
        for snapshot in snapshots:
            last = add(experiment, snapshot, after=last)
        experiment.run(detach=True)  # Slurm has the dependencies, so nothing has to stay here


def run_here(snapshots: Sequence[Path]) -> None:
    """Runs jobs on this host, one after the other.

    Raises:
        SystemExit: a job did not finish; those after it are not started.
    """
    import nemo_run as run

    for snapshot in snapshots:
        name = _read(snapshot)["name"]
        # An experiment each: within one, nemo-run starts the next job after a failure, too.
        with run.Experiment(name) as experiment:
            experiment.add(task(snapshot), executor=local_executor(), name=name)
            experiment.run(detach=False, tail_logs=True)
        if not (snapshot / "finished").exists():
            raise SystemExit(f"{name} did not finish; what follows was not started")


def _read(snapshot: Path) -> dict[str, Any]:
    job: dict[str, Any] = json.loads((snapshot / "job.json").read_text(encoding="utf-8"))
    return job


def main(where: str, *folders: str) -> None:
    """Submits the jobs, or runs them on this host."""
    snapshots = [Path(folder) for folder in folders]
    try:
        if where == "local":
            run_here(snapshots)
        else:
            submit(snapshots, _read(snapshots[-1])["name"])
    except Exception as error:  # of any of nemo-run's schedulers and tunnels
        sys.exit(f"nemo-run: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
