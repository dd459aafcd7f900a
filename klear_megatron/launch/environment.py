"""Environment variables of a job's processes: what Megatron-Bridge's recipes set, and why."""

from klear_megatron.launch.config import LaunchConfig
from klear_megatron.policy.config import ParallelConfig


def trainer_environment(launch: LaunchConfig, parallel: ParallelConfig) -> dict[str, str]:
    """Variables of a trainer's ranks.

    Variables of the fabric, such as NCCL_SOCKET_IFNAME and NCCL_IB_HCA, are the site's.
    """
    recipe = {
        # Ranks share a host's cores; torchrun sets the same.
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Packed batches differ in shape from step to step; fixed segments would fragment.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # Registers buffers of CUDA graphs, which expandable segments do not allow.
        "NCCL_GRAPH_REGISTER": "0",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "TORCH_NCCL_HIGH_PRIORITY": "1",
        # Leaves streaming multiprocessors to NCCL while a norm runs.
        "NVTE_FWD_LAYERNORM_SM_MARGIN": "20",
        "NVTE_BWD_LAYERNORM_SM_MARGIN": "20",
    }
    overlaps = parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if launch.gpu != "blackwell" and overlaps:
        # One queue: a matrix product must not overtake the communication that it is to hide.
        recipe["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return recipe | launch.environment


def other_environment(launch: LaunchConfig) -> dict[str, str]:
    """Variables of servers and of every other verb. SGLang sets those of its own."""
    return {"TOKENIZERS_PARALLELISM": "false"} | launch.environment
