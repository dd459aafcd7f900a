"""Settings that every training run has."""

from abc import abstractmethod
from pathlib import Path

from pydantic import PositiveInt

from klear_megatron.config import Section
from klear_megatron.policy.config import PolicyConfig


class RunConfig(Section):
    """What every training run has."""

    run_dir: Path
    """Everything the run writes: config, metrics, logs, rollouts, checkpoints. A run that finds a
    checkpoint there goes on from it."""
    seed: int = 0
    """Fixes the order of the data, and what is drawn at random."""
    save_every: PositiveInt | None
    """Steps between checkpoints; one is always written at the end, and with null only there.
    `policy.checkpoint` says how many are kept."""
    export_every: PositiveInt | None = None
    """Steps between Hugging Face checkpoints, written to `hf/` under the run directory."""
    watchdog_s: PositiveInt | None = 3600
    """End the run when no rank has made progress for so many seconds, and write down where each one
    waits. Longer than the longest save. Null waits for ever."""
    start_without_room: bool = False
    """Start even if the plan says that the memory does not suffice for the longest sequences."""
    policy: PolicyConfig

    @abstractmethod
    def describe_step(self, data_parallel_size: int) -> list[str]:
        """How a step's samples are divided over the data-parallel ranks, in plain lines."""
