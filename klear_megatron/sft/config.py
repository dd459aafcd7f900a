"""Settings of supervised fine-tuning."""

from pydantic import PositiveInt

from klear_megatron.data import ConversationsConfig
from klear_megatron.training.config import RunConfig


class SFTConfig(RunConfig):
    """Supervised fine-tuning: `klear-megatron sft`."""

    data: ConversationsConfig
    epochs: PositiveInt = 1
    batch_size: PositiveInt
    """Conversations per optimizer step."""
