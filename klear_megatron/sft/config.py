"""Settings of supervised fine-tuning."""

from pydantic import PositiveInt

from klear_megatron.data import ConversationsConfig
from klear_megatron.training.config import RunConfig


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

    def describe_step(self, data_parallel_size: int) -> list[str]:
        each = self.batch_size / data_parallel_size
        return [
            f"an optimizer step: {self.batch_size} conversations / DP {data_parallel_size} = "
            f"{each:g} per data-parallel rank"
        ]
