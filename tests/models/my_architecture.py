"""An architecture in a user's own file."""

from klear_megatron.models import register_architecture
from klear_megatron.models.qwen3 import Qwen3


class MyModel(Qwen3):
    """Qwen3 under another name."""


register_architecture("MyModelForCausalLM", MyModel())
