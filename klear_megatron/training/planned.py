"""What was planned for a run, said at its start, and beside it what its first steps measured."""

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.planning import Hardware, Plan, PlannedModel, Work, hardware_here, plan
from klear_megatron.planning.report import refusal, short_layout
from klear_megatron.planning.run import PLAN, PlannedRun
from klear_megatron.platform import objects
from klear_megatron.platform.files import write_atomically
from klear_megatron.training.config import RunConfig

_OBSERVED = (2, 3)
"""Steps since the start whose measurements are said; the first one also warms up."""


def plan_longest(config: RunConfig, model: PlannedModel, hardware: Hardware, ranks: int) -> Plan:
    """The plan of an optimizer step whose sequences are as long as allowed."""
    run = PlannedRun.of(config)
    work, reference = run.work(model.positions), run.has_reference
    return plan(
        config.policy, work, gpus=ranks, hardware=hardware, model=model, reference=reference
    )


def describe_longest(planned: Plan) -> str:
    """What `plan_longest` found, in a line."""
    return (
        f"planned: {short_layout(planned.layout)}: {planned.memory.total / 2**30:.2f} GiB of "
        f"{planned.available_bytes / 2**30:.2f} GiB, and {planned.seconds.total:.2f} s per "
        "optimizer step, with sequences as long as allowed"
    )


class PlannedSteps:
    """A run's plan on the hardware that it runs on. Collective.

    Raises:
        UserError: the run cannot fit, with the arithmetic, unless `start_without_room` is set.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._steps = 0
        self._model: PlannedModel | None = None
        self._hardware: Hardware | None = None
        self._peak_flops = 0.0
        self._record: dict[str, Any] = {}
        lacking = None
        if dist.get_rank() == 0:
            lacking = self._announce()
        lacking = objects.broadcast(lacking)
        if lacking and not config.start_without_room:
            raise UserError(lacking)

    def _announce(self) -> str | None:
        """Says what is planned for the longest sequences; returns a refusal if it does not fit."""
        self._model = PlannedModel.read(self.config.policy.hf_folder)
        try:
            self._hardware = hardware_here()
        except UserError as error:
            say(f"no plan: {error}")
            return None
        planned = plan_longest(self.config, self._model, self._hardware, dist.get_world_size())
        self._peak_flops = planned.peak_flops
        self._record = {"plan": planned.as_json(), "steps": []}
        self._write()
        say(describe_longest(planned))
        return None if planned.fits else refusal(planned)

    def _write(self) -> None:
        """For `klear-megatron report`."""
        with write_atomically(self.config.run_dir / PLAN) as file:
            json.dump(self._record, file)

    def _plan(self, lengths: Sequence[int]) -> Plan:
        assert self._hardware is not None
        ranks = dist.get_world_size()
        return plan(
            self.config.policy,
            Work(tuple(lengths)),
            gpus=ranks,
            hardware=self._hardware,
            model=self._model,
            reference=PlannedRun.of(self.config).has_reference,
        )

    def flops(self, lengths: Sequence[int], passes: int = 3) -> float:
        """Model FLOPs of these sequences; 0 on ranks other than the first.

        Args:
            passes: forward is one, and backward two.
        """
        return self._model.model_flops(lengths) * passes / 3 if self._model else 0.0

    def mfu(self, lengths: Sequence[int], seconds: float) -> float | None:
        """Model FLOPs of training these sequences, as a share of what all ranks could do in so many
        seconds; None on ranks other than the first, and where the hardware is not known."""
        if self._hardware is None:
            return None
        return self.flops(lengths) / (seconds * dist.get_world_size() * self._peak_flops)

    def observe(
        self, step: int, lengths: Sequence[int], at_a_time: int, seconds: float, peak_gib: float
    ) -> None:
        """Says what a step took beside what was planned for its own sequences.

        Args:
            lengths: tokens of each sequence of the step.
            at_a_time: sequences of one optimizer step.
            seconds: that the optimizer steps took.
            peak_gib: the most memory that a rank has used.
        """
        self._steps += 1
        if self._hardware is None or self._steps not in _OBSERVED:
            return
        starts = range(0, len(lengths), at_a_time)
        plans = [self._plan(lengths[start : start + at_a_time]) for start in starts]
        planned_s = sum(of_one.seconds.total for of_one in plans)
        planned_gib = max(of_one.memory.total for of_one in plans) / 2**30
        say(
            f"step {step}: planned {planned_s:.2f} s of training and {planned_gib:.2f} GiB; "
            f"measured {seconds:.2f} s and {peak_gib:.2f} GiB"
        )
        self._record["steps"].append(
            {
                "step_of_start": self._steps,
                "planned": {"seconds": planned_s, "gib": planned_gib},
                "measured": {"seconds": seconds, "gib": peak_gib},
            }
        )
        self._write()
