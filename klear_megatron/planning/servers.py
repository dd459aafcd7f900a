"""What the SGLang servers of an RL run hold, and how long generation and a push of weights take."""

from dataclasses import dataclass

from klear_megatron.planning.hardware import Hardware
from klear_megatron.planning.model import PlannedModel

_HEADROOM = 1.3
"""A decoding step takes this much longer than its memory traffic: sampling, launches; assumed."""


@dataclass(frozen=True)
class ServerPlan:
    """One rank of a server, and a step's generation on all servers."""

    weights_bytes: int
    cache_bytes: int
    """Room for keys and values."""
    cache_bytes_per_token: int
    sequences: int
    """How many of the run's longest sequences the cache holds at a time."""
    generation_seconds: float
    """Of one step, if every response is as long as allowed: an upper bound."""
    push_seconds: float
    """Of the weights to the servers, over the network."""


def plan_servers(
    model: PlannedModel,
    hardware: Hardware,
    *,
    servers: int,
    tensor_parallel: int,
    memory_fraction: float,
    max_running: int,
    element: int,
    responses: int,
    prompt_tokens: int,
    response_tokens: int,
) -> ServerPlan:
    """The plan of so many servers.

    Args:
        memory_fraction: of the memory, for weights and cache.
        max_running: sequences that a server generates at a time, at most.
        element: bytes of a weight, and of a key or value.
        responses: of one step, over all servers.
    """
    bandwidth = hardware.bandwidth * hardware.efficiency.bandwidth
    weights = model.parameters * element // tensor_parallel
    cache = max(0, int(hardware.memory * memory_fraction) - weights)
    per_token = 2 * model.layers * model.groups * model.head_dim * element // tensor_parallel
    sequences = cache // (per_token * (prompt_tokens + response_tokens))
    each = -(-responses // servers)
    running = max(1, min(max_running, sequences, each))
    # A step reads the weights that its tokens work on, and every key and value so far.
    mean_length = prompt_tokens + response_tokens / 2
    traffic = weights + running * mean_length * per_token
    rounds = -(-each // running)
    generation = rounds * response_tokens * traffic / bandwidth * _HEADROOM
    dense, experts = model.layer_matrices
    flops = 2 * each * prompt_tokens * model.layers * (dense + experts) / tensor_parallel
    prefill = flops / (hardware.flops.bfloat16 * hardware.efficiency.matrix)
    push = weights * tensor_parallel / (hardware.network * hardware.efficiency.bandwidth)
    return ServerPlan(weights, cache, per_token, sequences, generation + prefill, push)
