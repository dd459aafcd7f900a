"""What was planned for a run, said at its start, and beside it what its first steps measured."""

import resource
from collections.abc import Sequence

import torch
import torch.distributed as dist

from klear_megatron.errors import UserError
from klear_megatron.observability import say
from klear_megatron.planning import Hardware, Plan, PlannedModel, Work, hardware_here, plan
from klear_megatron.planning.report import refusal, short_layout
from klear_megatron.planning.run import PlannedRun
from klear_megatron.platform import objects
from klear_megatron.training.config import RunConfig

_OBSERVED = (2, 3)
"""Steps whose measurements are said; the first one also warms up."""


class PlannedSteps:
    """A run's plan on the hardware that it runs on. Collective.

    Raises:
        UserError: the run cannot fit, with the arithmetic, unless `start_without_room` is set.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._steps = 0
        self._hardware: Hardware | None = None
        lacking = None
        if dist.get_rank() == 0:
            lacking = self._announce()
        lacking = objects.broadcast(lacking)
        if lacking and not config.start_without_room:
            raise UserError(lacking)

    def _announce(self) -> str | None:
        """Says what is planned for the longest sequences; returns a refusal if it does not fit."""
        try:
            self._hardware = hardware_here()
        except UserError as error:
            say(f"no plan: {error}")
            return None
        self._model = PlannedModel.read(self.config.policy.hf_folder)
        work = PlannedRun.of(self.config).work(self._model.positions)
        planned = self._plan(work.lengths)
        say(
            f"planned: {short_layout(planned)}: {planned.memory.total / 2**30:.2f} GiB of "
            f"{planned.available_bytes / 2**30:.2f} GiB, and {planned.seconds.total:.2f} s per "
            "optimizer step, with sequences as long as allowed"
        )
        return None if planned.fits else refusal(planned)

    def _plan(self, lengths: Sequence[int]) -> Plan:
        assert self._hardware is not None
        ranks = dist.get_world_size()
        return plan(
            self.config.policy,
            Work(tuple(lengths)),
            gpus=ranks,
            hardware=self._hardware,
            model=self._model,
        )

    def observe(self, lengths: Sequence[int], at_a_time: int, seconds: float) -> None:
        """Says what a step took beside what was planned for its own sequences.

        Args:
            lengths: tokens of each sequence of the step.
            at_a_time: sequences of one optimizer step.
            seconds: that the optimizer steps took.
        """
        self._steps += 1
        if self._hardware is None or self._steps not in _OBSERVED:
            return
        starts = range(0, len(lengths), at_a_time)
        plans = [self._plan(lengths[start : start + at_a_time]) for start in starts]
        planned = max(of_one.memory.total for of_one in plans) / 2**30
        say(
            f"step {self._steps}: planned {sum(p.seconds.total for p in plans):.2f} s of training "
            f"and {planned:.2f} GiB; measured {seconds:.2f} s and {_peak() / 2**30:.2f} GiB"
        )


def _peak() -> int:
    """The most bytes that this rank has used: the GPU's memory, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
