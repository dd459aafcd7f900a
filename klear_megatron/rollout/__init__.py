"""SGLang: starting servers, drawing responses from them, and keeping their weights current."""

from klear_megatron.rollout.config import RolloutConfig, SamplingConfig, ServeConfig
from klear_megatron.rollout.generation import GenerationError, Generator, Response
from klear_megatron.rollout.servers import serving

__all__ = [
    "GenerationError",
    "Generator",
    "Response",
    "RolloutConfig",
    "SamplingConfig",
    "ServeConfig",
    "serving",
]
