"""Every random state of a rank: seeded as Megatron-LM does it, kept in checkpoints, restored."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def seed_random_states(seed: int) -> None:
    """Python's, NumPy's, PyTorch's and the device's, and those that Megatron tracks by name.

    Pipeline stages get different seeds, so that they do not drop the same activations. Call it once
    Megatron's process groups exist.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def random_states() -> ShardedObject:
    """This rank's states now, in the form that Megatron's checkpoints keep."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random_states", states, (dist.get_world_size(),), (dist.get_rank(),))


def restore_random_states(states: dict[str, Any]) -> None:
    """The contents of `random_states`, from a checkpoint of the same layout."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
