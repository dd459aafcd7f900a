"""The points of a scaling experiment as jobs. Those of one size are the tasks of one array."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klear_megatron.errors import UserError
from klear_megatron.launch.config import LaunchConfig
from klear_megatron.launch.job import Job
from klear_megatron.launch.snapshot import snapshot_path
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.scaling.config import Point, ScalingConfig
from klear_megatron.scaling.results import folder, read_kept
from klear_megatron.scaling.run import check_points


@dataclass(frozen=True, kw_only=True)
class PointJob(Job):
    """The job that measures one point. Its files are beside the point's result."""

    point: Point
    number: int

    @property
    def run_dir(self) -> Path:
        """The folder of the job's own files, absolute."""
        return self.snapshot.parents[2]

    @property
    def policy(self) -> PolicyConfig:
        """The policy's settings, with the point's layout and variant."""
        return self.point.policy

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `klear-megatron scaling`."""
        return (*super().arguments, f"--point={self.number}")


def point_jobs(launch: LaunchConfig, config: ScalingConfig) -> list[PointJob]:
    """A job for each point that has no result yet.

    Raises:
        UserError: a point that cannot be, or whose ranks do not fill its nodes; or none is left.
    """
    jobs = [
        PointJob(
            # A point that fails would fail again.
            launch.model_copy(update=_size(launch, point) | {"requeue": False}),
            config,
            snapshot_path(folder(config) / point.name),
            Path.cwd(),
            point=point,
            number=number,
        )
        for number, point in enumerate(check_points(config))
        if read_kept(config, point) is None
    ]
    if not jobs:
        raise UserError(
            f"{config.run_dir}: every point has a result with these settings; use "
            "`klear-megatron scaling FILE --tables`, or another run_dir to measure again"
        )
    return jobs


def _size(launch: LaunchConfig, point: Point) -> dict[str, int]:
    per_node = min(point.ranks, launch.ranks_per_node)
    if point.ranks % per_node:
        raise UserError(
            f"layouts.{point.layout}.ranks: {point.ranks} ranks do not fill nodes of {per_node} "
            "(launch.ranks_per_node); change one of them"
        )
    return {"nodes": point.ranks // per_node, "ranks_per_node": per_node}


def by_size(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs that can be one array, smallest first: all tasks of an array have one size."""

    def size(job: Job) -> tuple[int, int]:
        return job.launch.nodes, job.launch.ranks_per_node

    return [list(group) for _, group in itertools.groupby(sorted(jobs, key=size), key=size)]
