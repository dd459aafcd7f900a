"""SGLang: starting servers, drawing responses from them, and keeping their weights current."""

from klear_megatron.rollout.config import RolloutConfig, SamplingConfig, ServeConfig
from klear_megatron.rollout.dispatch import Share
from klear_megatron.rollout.generation import Generator, generating
from klear_megatron.rollout.requests import GenerationError, Response, ServersLostError
from klear_megatron.rollout.servers import Servers, serving

__all__ = [
    "GenerationError",
    "Generator",
    "Response",
    "RolloutConfig",
    "SamplingConfig",
    "ServeConfig",
    "Servers",
    "ServersLostError",
    "Share",
    "generating",
    "serving",
]
