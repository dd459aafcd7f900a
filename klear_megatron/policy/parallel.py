"""Sets up Megatron's process groups and random states for a `ParallelConfig`."""

import torch.distributed as dist
from megatron.core import parallel_state

from klear_megatron.errors import UserError
from klear_megatron.platform.device import init_distributed
from klear_megatron.policy.config import ParallelConfig
from klear_megatron.policy.random_states import seed_random_states


def initialize_model_parallel(config: ParallelConfig, seed: int) -> None:
    """Joins the default process group if need be and builds Megatron's groups over it.

    Existing groups are kept, because the models of one process share them.

    Args:
        seed: seeds the random states when the groups are first built.

    Raises:
        UserError: the world size is not divisible by TP x PP x CP, or the existing groups have
            other sizes.
    """
    init_distributed()
    config.data_parallel_size(dist.get_world_size())
    if parallel_state.is_initialized():
        _check_same_sizes(config)
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
    )
    seed_random_states(seed)


def _check_same_sizes(config: ParallelConfig) -> None:
    wanted = {
        "TP": config.tensor_model_parallel_size,
        "PP": config.pipeline_model_parallel_size,
        "CP": config.context_parallel_size,
        "EP": config.expert_model_parallel_size,
        "expert TP": config.expert_tensor_size,
        "VPP": config.virtual_pipeline_model_parallel_size,
    }
    present = {
        **parallel_sizes(),
        "VPP": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    }
    for name, size in wanted.items():
        if present[name] != size:
            raise UserError(
                f"policy.parallel: {name} {size} beside a model of {name} {present[name]}; all "
                "models of a process need the same parallel sizes"
            )


def leader_rank() -> tuple[int | None, int]:
    """The number of the model-parallel group that this rank leads, and how many groups there are.

    There is one group per data-parallel rank, and its first rank leads; others get None.
    """
    leads = (
        parallel_state.get_tensor_model_parallel_rank()
        == parallel_state.get_pipeline_model_parallel_rank()
        == parallel_state.get_context_parallel_rank()
        == 0
    )
    rank = parallel_state.get_data_parallel_rank()
    return rank if leads else None, parallel_state.get_data_parallel_world_size()


def parallel_sizes() -> dict[str, int]:
    """The sizes that decide which part of the model and of the work each rank gets."""
    return {
        "TP": parallel_state.get_tensor_model_parallel_world_size(),
        "PP": parallel_state.get_pipeline_model_parallel_world_size(),
        "CP": parallel_state.get_context_parallel_world_size(),
        "DP": parallel_state.get_data_parallel_world_size(),
        "EP": parallel_state.get_expert_model_parallel_world_size(),
        "expert TP": parallel_state.get_expert_tensor_parallel_world_size(),
    }
