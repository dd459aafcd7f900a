"""Settings of supervised fine-tuning."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import PositiveInt

from klear_megatron.config import Section
from klear_megatron.data import ConversationsConfig
from klear_megatron.training.config import RunConfig


class ValidationConfig(Section):
    """Held-out conversations, whose loss is measured between steps. They are read by the settings
    of `data`."""

    every: PositiveInt
    """Steps between measurements. There is also one before the first step and one after the last.
    """
    path: Path | tuple[Path, ...]
    """As `data.path`; the same data set with another `split`, for example."""
    split: str | None = None
    """The split of a data set on the hub, or of a folder; train by default."""


class SFTConfig(RunConfig):
    """Supervised fine-tuning: `klear-megatron sft`."""

    save_every: PositiveInt | None = 500
    """Steps between checkpoints; one is always written at the end, and with null only there.
    `policy.checkpoint` says how many are kept."""
    data: ConversationsConfig
    epochs: PositiveInt = 1
    """Passes over the data."""
    steps: PositiveInt | None = None
    """Optimizer steps; takes the place of `epochs`."""
    batch_size: PositiveInt
    """Conversations per optimizer step."""
    validation: ValidationConfig | None = None

    @property
    def validation_data(self) -> ConversationsConfig | None:
        """Which conversations to measure the loss of."""
        if self.validation is None:
            return None
        changes = self.validation.model_dump(exclude={"every"})
        return self.data.model_copy(update=changes)

    @property
    def method(self) -> str:
        return "supervised fine-tuning"

    @property
    def data_paths(self) -> Sequence[Path]:
        return self.data.paths

    def describe_step(self, data_parallel_size: int) -> list[str]:
        each = round(self.batch_size / data_parallel_size, 1)
        return [
            f"an optimizer step: {self.batch_size} conversations / DP {data_parallel_size} = "
            f"{each:g} per data-parallel rank"
        ]
