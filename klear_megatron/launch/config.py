"""Settings of a job: what the cluster asks for, and what the run needs."""

import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from klear_megatron.config import Section

Verb = Literal["sft", "rl", "serve", "eval", "curate", "convert", "verify", "release", "scaling"]
TRAINING_VERBS = ("sft", "rl")
ARGUMENT_VERBS = ("convert", "verify", "release")
"""Verbs that take arguments instead of a YAML file."""
PACKAGE_PARENT = Path(__file__).parents[2]
"""The folder from which the package is imported: the checkout, or site-packages."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
_FLAG = re.compile(r"--[a-z][a-z0-9-]*(=[^\n]*)?")


class ContainerConfig(Section):
    """The image that the steps run in."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs the image."""
    image: str
    """The image: a file, or the address of a registry."""
    mounts: tuple[str, ...] = ()
    """Each as `HOST:CONTAINER`. The working directory and the run directory are always mounted,
    under their own names."""


class SiteConfig(Section):
    """What a cluster asks for: the site file. A run's `launch:` section overrides it."""

    account: str | None = None
    """Slurm account to charge."""
    partition: str | None = None
    """Slurm partition."""
    qos: str | None = None
    """Slurm quality of service."""
    time: str = "04:00:00"
    """Time limit of one job, in Slurm's notation. The run is saved before it and goes on after."""
    gpus_per_node: PositiveInt | None = None
    """Requested with --gpus-per-node. Leave out this and `gres` where nodes are given out whole."""
    gres: str | None = None
    """Requested with --gres instead, such as `gpu:h100:8`."""
    gpu: Literal["ampere", "hopper", "blackwell"] = "hopper"
    """GPU generation. It decides some environment variables; see `environment`."""
    container: ContainerConfig | None = None
    setup: tuple[str, ...] = ()
    """Shell lines that the batch script runs first, unchanged: `module load cuda/13.0`."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of every process of the job. Names and values are kept as written. They override
    the recipe's own."""
    secrets: tuple[str, ...] = ()
    """Names of variables that are passed on from your shell. Their values are never written."""
    sbatch_flags: tuple[str, ...] = ()
    """More flags of sbatch, each as `--name` or `--name=value`, passed on unchanged."""
    srun_flags: tuple[str, ...] = ()
    """More flags of every srun, passed on unchanged."""
    ports: tuple[int, int] = (7000, 8999)
    """First and last port to choose from. Some systems give ports from 9000 up to clients."""
    python: Path = Path(sys.executable)
    """Interpreter of the package's environment, on the nodes or in the container."""
    nemo_run_python: Path = Path(f"{sys.prefix}-launch") / "bin" / "python"
    """Interpreter of the environment that has nemo-run, on the host that you submit from."""
    grace_s: PositiveInt = 300
    """The run is told to save this many seconds before the time limit."""

    @model_validator(mode="after")
    def _gpus_are_requested_once(self) -> "SiteConfig":
        if self.gres and self.gpus_per_node:
            raise ValueError("gres and gpus_per_node request the same GPUs; set one of them")
        return self

    @field_validator("time", mode="before")
    @classmethod
    def _is_a_time(cls, time: object) -> object:
        if not isinstance(time, str):
            raise ValueError("put the time in quotes; YAML reads 12:00:00 as a number")
        if not _TIME.fullmatch(time):
            raise ValueError(f"{time!r} is not a time; write HH:MM:SS or D-HH:MM:SS")
        return time

    @model_validator(mode="after")
    def _grace_fits_into_the_limit(self) -> "SiteConfig":
        if self.grace_s >= _seconds(self.time):
            raise ValueError(
                f"grace_s ({self.grace_s}) is not less than time ({self.time}), so the run would "
                "be told to end as soon as it begins; choose a smaller grace_s or a longer time"
            )
        return self

    @field_validator("environment", "secrets")
    @classmethod
    def _are_names(
        cls, names: dict[str, str] | tuple[str, ...]
    ) -> dict[str, str] | tuple[str, ...]:
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of an environment variable")
        return names

    @field_validator("sbatch_flags", "srun_flags")
    @classmethod
    def _are_long_flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for flag in flags:
            if not _FLAG.fullmatch(flag):
                raise ValueError(f"{flag!r}: write a flag as --name or --name=value, on one line")
        return flags

    @field_validator("ports")
    @classmethod
    def _are_a_range(cls, ports: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= ports[0] < ports[1] <= 65535:
            raise ValueError(f"{list(ports)}: give the first and the last port, within 1024..65535")
        return ports


def _seconds(time: str) -> int:
    """The seconds of a limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


class ServersConfig(Section):
    """Where the rollout servers run: on nodes of this job, or in another job."""

    nodes: PositiveInt | None = None
    """Nodes of this job that only run SGLang servers."""
    per_node: PositiveInt = 1
    """Servers per node. Each takes `rollout.tensor_parallel_size` of its GPUs."""
    run: Path | None = None
    """Run directory of a job that was launched with `verb: serve`. Its servers are used. They get
    this run's weights, so no other run can use them at the same time."""
    deadline_s: PositiveInt = 1800
    """Seconds within which all servers must answer."""

    @model_validator(mode="after")
    def _are_somewhere(self) -> "ServersConfig":
        if (self.nodes is None) == (self.run is None):
            raise ValueError("servers: set either nodes (in this job) or run (of another job)")
        return self


class LaunchConfig(SiteConfig):
    """The `launch:` section of a run's YAML file."""

    verb: Verb
    """What to run: `klear-megatron VERB`."""
    run_dir: Path | None = None
    """Folder for the job's own files, in `launch/`. Only for verbs whose config has no `run_dir`:
    `curate`, and those that take arguments."""
    arguments: tuple[str, ...] = ()
    """Arguments of a verb that takes no YAML file: `[runs/sft, runs/sft-hf]` for `convert`."""
    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$")
    """Name of the job; by default the run directory's name."""
    nodes: PositiveInt = 1
    """Nodes of the trainer, or of any other verb."""
    ranks_per_node: PositiveInt = 1
    """Trainer ranks per node: usually its GPUs."""
    cpus_per_rank: PositiveInt | None = None
    """By default, nodes are requested whole (--exclusive), and processes use any of their CPUs."""
    servers: ServersConfig | None = None
    """Only for `rl`. Without it, the trainer starts the servers that `rollout` asks for on its
    first node."""
    heterogeneous: bool = False
    """Request the servers' nodes as the second component of a heterogeneous job."""
    requeue: bool = True
    """Put the job back into the queue after its time limit and after a failure. If false, Slurm may
    still do so when a node is lost or the job is preempted: nemo-run submits with --requeue."""
    failures_in_a_row: PositiveInt = 3
    """Give up after this many failures without a new step. Bad input is never tried again."""
    continuations: int = Field(0, ge=0)
    """More jobs that wait for this one and go on where it ended. They do nothing once the run is
    finished. Use them where jobs may not be requeued."""
    singleton: bool = False
    """Jobs also wait for every earlier job of yours of their name (`singleton`), so launching a run
    again while it runs adds more continuations."""

    @model_validator(mode="after")
    def _fits_the_verb(self) -> "LaunchConfig":
        if self.servers and self.verb != "rl":
            raise ValueError(f"servers: {self.verb} does not use any; leave it out")
        if self.heterogeneous and not (self.servers and self.servers.nodes):
            raise ValueError("heterogeneous: needs servers.nodes; set them, or leave it out")
        if self.heterogeneous and self.singleton:
            raise ValueError("singleton: the parts of a heterogeneous job have names of their own")
        if self.verb == "scaling" and self.nodes > 1:
            raise ValueError(
                "nodes: each layout says its ranks; set ranks_per_node, and leave it out"
            )
        if self.verb not in (*TRAINING_VERBS, "serve") and self.nodes > 1:
            raise ValueError(f"nodes: {self.verb} is one process; leave it out")
        if self.verb not in (*TRAINING_VERBS, "serve", "scaling") and self.ranks_per_node > 1:
            raise ValueError(f"ranks_per_node: {self.verb} is one process; leave it out")
        if self.verb in ARGUMENT_VERBS and not self.arguments:
            raise ValueError(f"arguments: missing; give those of `klear-megatron {self.verb}`")
        if self.verb not in ARGUMENT_VERBS and self.arguments:
            raise ValueError(f"arguments: {self.verb} takes the file's own keys; leave it out")
        return self

    @model_validator(mode="after")
    def _ranks_have_gpus(self) -> "LaunchConfig":
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node ({self.ranks_per_node}) is more than gpus_per_node "
                f"({self.gpus_per_node})"
            )
        return self

    @property
    def server_nodes(self) -> int:
        """Nodes of this job that only run servers."""
        return (self.servers.nodes or 0) if self.servers else 0
