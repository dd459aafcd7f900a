"""A run's config and its `launch:` section as a job: pure functions to text and JSON."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klear_megatron.checkpoints.hub import local_model
from klear_megatron.config import Section
from klear_megatron.errors import UserError
from klear_megatron.launch.config import (
    ARGUMENT_VERBS,
    PACKAGE_PARENT,
    TRAINING_VERBS,
    LaunchConfig,
)
from klear_megatron.launch.environment import other_environment, trainer_environment
from klear_megatron.planning import Plan, PlannedModel, plan, read_hardware
from klear_megatron.planning.report import refusal
from klear_megatron.planning.run import PlannedRun
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.rollout.config import RolloutConfig, ServeConfig
from klear_megatron.training.config import RunConfig

_HARDWARE = {"ampere": "a100", "hopper": "h100", "blackwell": "b200"}
Flags = dict[str, str | None]
"""Flags of sbatch or srun without their dashes; None for one without a value."""


def run_dir_of(launch: LaunchConfig, config: Section) -> Path:
    """The folder that a job's files are in: that of the run, or of `launch.run_dir`.

    Raises:
        UserError: both say one, or none does.
    """
    own: Path | None = getattr(config, "run_dir", None)
    if own and launch.run_dir:
        raise UserError(f"launch.run_dir: {launch.verb} has a run_dir of its own; leave it out")
    run_dir = own or launch.run_dir
    if run_dir is None:
        raise UserError(
            f"launch.run_dir: missing; {launch.verb} needs a folder for the job's files"
        )
    return run_dir


@dataclass(frozen=True)
class Job:
    """A run and the job that it is submitted as.

    Args:
        config: the resolved config of the verb.
        snapshot: folder for the files of this submission; absolute.
        working_directory: that of every process; relative paths of the config start there.
        local: all nodes are this host.
    """

    launch: LaunchConfig
    config: Section
    snapshot: Path
    working_directory: Path
    local: bool = False

    @property
    def run_dir(self) -> Path:
        """The run directory, absolute."""
        return self.working_directory / run_dir_of(self.launch, self.config)

    @property
    def name(self) -> str:
        # nemo-run passes it through a shell.
        return self.launch.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", self.run_dir.name)

    @property
    def nodes(self) -> int:
        """Nodes of the whole job."""
        return self.launch.nodes + self.launch.server_nodes

    @property
    def policy(self) -> PolicyConfig | None:
        """The policy's settings, for the verbs that train."""
        return getattr(self.config, "policy", None)

    @property
    def rollout(self) -> RolloutConfig | None:
        """The servers' settings, for the verbs that have servers."""
        return getattr(self.config, "rollout", None)

    def check(self) -> None:
        """Checks that the layout fits the nodes.

        Raises:
            UserError: ranks that the parallel sizes do not divide, servers with more GPUs than a
                node has, servers that are set twice, a requeued run that is never saved, or a
                layout whose planned memory no GPU has.
        """
        launch, rollout = self.launch, self.rollout
        if self.policy is not None:
            self.policy.parallel.data_parallel_size(launch.nodes * launch.ranks_per_node)
        if isinstance(self.config, RunConfig) and self.config.save_every is None and launch.requeue:
            raise UserError(
                "save_every: not set, so a requeued job would begin anew each time; set it, or set "
                "launch.requeue to false"
            )
        planned = self.plan()
        if planned and not planned.fits and not getattr(self.config, "start_without_room", False):
            raise UserError(refusal(planned))
        if launch.servers and rollout and rollout.urls:
            raise UserError("rollout.urls and launch.servers both say where servers are; unset one")
        if rollout and (launch.servers or launch.verb == "serve") and launch.gpus_per_node:
            gpus = self._servers_per_node * rollout.tensor_parallel_size
            if gpus > launch.gpus_per_node:
                raise UserError(
                    f"launch.servers: {self._servers_per_node} servers per node of "
                    f"{rollout.tensor_parallel_size} GPUs each (rollout.tensor_parallel_size) need "
                    f"{gpus} GPUs, but a node has {launch.gpus_per_node} (launch.gpus_per_node)"
                )

    def plan(self) -> Plan | None:
        """Memory and time of the trainer's worst rank, with sequences as long as allowed. None for
        other verbs, without GPUs, or where the model is not there yet."""
        launch, policy = self.launch, self.policy
        gpus = launch.gpus_per_node or launch.gres
        if not isinstance(self.config, RunConfig) or policy is None or not gpus:
            return None
        try:
            folder = local_model(policy.hf_folder, ["config.json"])
        except UserError:  # no such name on the hub, or no network here
            return None
        if not (folder / "config.json").is_file():
            return None
        model, run = PlannedModel.read(folder), PlannedRun.of(self.config)
        return plan(
            policy,
            run.work(model.positions),
            gpus=launch.nodes * launch.ranks_per_node,
            hardware=read_hardware(_HARDWARE[launch.gpu]),
            model=model,
            reference=run.has_reference,
        )

    @property
    def _servers_per_node(self) -> int:
        if self.launch.servers:
            return self.launch.servers.per_node
        return self.rollout.num_servers if self.rollout else 0

    def header(self) -> list[Flags]:
        """The flags of sbatch: one component, or two of a heterogeneous job."""
        launch = self.launch
        if not launch.heterogeneous:
            return [self._common_flags() | self._size(self.nodes)]
        sizes = (launch.nodes, launch.server_nodes)
        return [self._common_flags() | self._size(nodes) for nodes in sizes]

    def _common_flags(self) -> Flags:
        launch = self.launch
        flags: Flags = {
            "job-name": self.name,
            "account": launch.account,
            "partition": launch.partition,
            "qos": launch.qos,
            "time": launch.time,
            "chdir": str(self.working_directory),
            "output": str(self.run_dir / "launch" / "%j.log"),
            "open-mode": "append",
            # Without «B:» it goes to every rank, and not to the batch shell.
            "signal": f"TERM@{launch.grace_s}",
            # A job whose dependency failed would wait for ever.
            "kill-on-invalid-dep": "yes",
            "dependency": "singleton" if launch.singleton else None,
        }
        flags = {name: value for name, value in flags.items() if value is not None}
        flags["requeue" if launch.requeue else "no-requeue"] = None
        for flag in launch.sbatch_flags:
            name, equals, value = flag.removeprefix("--").partition("=")
            flags[name] = value if equals else None
        return flags

    def _size(self, nodes: int) -> Flags:
        launch = self.launch
        flags: Flags = {"nodes": str(nodes), "ntasks-per-node": str(launch.ranks_per_node)}
        if launch.cpus_per_rank is None:
            flags["exclusive"] = None
        else:
            flags["cpus-per-task"] = str(launch.cpus_per_rank)
        if launch.gpus_per_node:
            flags["gpus-per-node"] = str(launch.gpus_per_node)
        if launch.gres:
            flags["gres"] = launch.gres
        return flags

    def script(self) -> str:
        """The script for sbatch. Everything that a config says is in job.json beside it, so no
        value passes through a shell."""
        folder, python = (shlex.quote(str(p)) for p in (self.working_directory, self._host_python))
        lines = [
            'unfit() { echo "error: $(hostname): $1"; exit 2; }',
            f'cd {folder} || unfit "the working directory has to be there on every node"',
            *self.launch.setup,
            f"export PYTHONPATH={shlex.quote(str(PACKAGE_PARENT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            *self._passed_into_the_image(),
            f"command -v {python} >/dev/null || unfit {python}' is not there; every node needs it'",
            f"exec {python} -m klear_megatron.launch.conductor "
            f"{shlex.quote(str(self.snapshot / 'job.json'))}",
        ]
        return f"#!/bin/bash\n{sbatch_lines(self.header())}" + "\n".join(lines) + "\n"

    def _passed_into_the_image(self) -> list[str]:
        """Lines by which these variables prevail over the image's own, for apptainer."""
        if self.launch.container is None or self.launch.container.runtime != "apptainer":
            return []
        names = ("PYTHONPATH", *self.launch.secrets)
        return [f'export APPTAINERENV_{name}="${name}"' for name in names]

    @property
    def _host_python(self) -> Path:
        """Runs the conductor, which is outside the container and needs no package."""
        return Path("python3") if self.launch.container else self.launch.python

    def data(self) -> dict[str, Any]:
        """What the conductor and the roles read: job.json."""
        launch = self.launch
        servers = self._server_step() if launch.server_nodes or launch.verb == "serve" else None
        return {
            "name": self.name,
            "header": self.header(),
            "continuations": launch.continuations,
            "run_dir": str(self.run_dir),
            "snapshot": str(self.snapshot),
            "nodes": self.nodes,
            "python": str(launch.python),
            "prefix": self._prefix(),
            "srun_flags": self._srun_flags(),
            "ports": list(launch.ports),
            "gpus_per_node": launch.gpus_per_node or 0,
            "needs": ["torch", "megatron.core", "transformers"],
            "programs": [str(self.rollout.python)] if self.rollout else [],
            "requeue": launch.requeue,
            "failures_in_a_row": launch.failures_in_a_row,
            "main": servers if launch.verb == "serve" else self._main_step(),
            "servers": servers,
            "servers_of": self._other_job(),
        }

    def _other_job(self) -> dict[str, Any] | None:
        """Which other job's servers are used, if any."""
        servers = self.launch.servers
        if servers is None or servers.run is None:
            return None
        run_dir = str(self.working_directory / servers.run)
        return {"run_dir": run_dir, "deadline_s": servers.deadline_s}

    def _command(self, verb: str, *arguments: str) -> list[str]:
        return [str(self.launch.python), "-m", "klear_megatron", verb, *arguments]

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `klear-megatron VERB`."""
        if self.launch.verb in ARGUMENT_VERBS:
            return self.launch.arguments
        return (str(self.snapshot / "config.yaml"),)

    def _main_step(self) -> dict[str, Any]:
        launch = self.launch
        trains = launch.verb in TRAINING_VERBS
        environment = other_environment(launch)
        if self.policy is not None:
            environment = trainer_environment(launch, self.policy.parallel)
        return {
            "role": "trainer" if trains else launch.verb,
            "nodes": launch.nodes,
            "tasks_per_node": launch.ranks_per_node,
            "command": self._command(launch.verb, *self.arguments),
            "environment": environment,
            "het_group": 0 if launch.heterogeneous else None,
        }

    def _server_step(self) -> dict[str, Any]:
        launch, rollout = self.launch, self.rollout
        assert rollout is not None  # the verbs are rl and serve
        step: dict[str, Any] = {
            "role": "server",
            "nodes": launch.server_nodes or launch.nodes,
            "tasks_per_node": 1,
            "per_node": self._servers_per_node,
            "gpus_per_server": rollout.tensor_parallel_size,
            "seed": getattr(self.config, "seed"),  # noqa: B009
            "deadline_s": launch.servers.deadline_s if launch.servers else 0,
            "command": self._command("serve", str(self.snapshot / "serve.yaml")),
            "environment": other_environment(launch),
            "het_group": 1 if launch.heterogeneous else None,
        }
        if self.local:
            trainer = launch.nodes * launch.ranks_per_node if launch.verb == "rl" else 0
            step["first_gpu"] = trainer
        return step

    def serve_config(self) -> ServeConfig | None:
        """The config of `klear-megatron serve` on a servers' node."""
        if isinstance(self.config, ServeConfig):
            return self.config
        if not self.launch.server_nodes or self.policy is None or self.rollout is None:
            return None
        path = self.policy.path
        return ServeConfig(model=path, run_dir=self.run_dir, rollout=self.rollout)

    def _mounts(self) -> list[str]:
        ours = (self.working_directory, self.run_dir, PACKAGE_PARENT)
        assert self.launch.container is not None
        return [*(f"{path}:{path}" for path in ours), *self.launch.container.mounts]

    def _srun_flags(self) -> list[str]:
        launch, flags = self.launch, []
        if launch.gpus_per_node:
            flags.append(f"--gpus-per-node={launch.gpus_per_node}")
        if launch.container and launch.container.runtime == "pyxis":
            flags += [
                f"--container-image={launch.container.image}",
                f"--container-mounts={','.join(self._mounts())}",
                f"--container-workdir={self.working_directory}",
            ]
            # The image may set them, too.
            flags.append(f"--container-env={','.join(['PYTHONPATH', *launch.secrets])}")
        return [*flags, *launch.srun_flags]

    def _prefix(self) -> list[str]:
        container = self.launch.container
        if container is None or container.runtime != "apptainer":
            return []
        binds = [word for mount in self._mounts() for word in ("--bind", mount)]
        gpus = ["--nv"] if self.launch.gpus_per_node or self.launch.gres else []
        where = ["--pwd", str(self.working_directory)]
        return ["apptainer", "exec", *gpus, *binds, *where, container.image]


def sbatch_lines(header: Sequence[Flags]) -> str:
    """The header of a script for sbatch; several components make a heterogeneous job."""
    return "#SBATCH hetjob\n".join(
        "".join(
            f"#SBATCH {shlex.quote(f'--{name}' if value is None else f'--{name}={value}')}\n"
            for name, value in component.items()
        )
        for component in header
    )
