"""Where this process runs: its device, its collective backend, and how Megatron-Core gets there.

Without a GPU, `init_distributed` first puts the stand-ins in place that Megatron-Core needs
(`klear_megatron.platform.cpu`).
"""

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from klear_megatron.platform import cpu

HAS_GPU = torch.cuda.is_available()
BACKEND: Literal["gloo", "nccl"] = "nccl" if HAS_GPU else "gloo"
_TIMEOUT = timedelta(minutes=30)


def this_device() -> torch.device:
    """The device of this rank: `cuda:LOCAL_RANK`, or the CPU."""
    if HAS_GPU:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_name() -> str:
    """What this rank computes on: its GPU's name, or CPU."""
    return torch.cuda.get_device_name() if HAS_GPU else "CPU"


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def ranks_on_this_host() -> int:
    """Ranks of the trainer on this host; without torchrun, the one of this process."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def init_distributed() -> None:
    """Joins the process group that torchrun describes; without torchrun, makes a world of one.

    Call it before making any of Megatron-Core's models, optimizers or process groups.
    """
    # SGLang's servers set the same unless it is set; a group of both fails where it differs.
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    if not HAS_GPU:
        cpu.install()
    if dist.is_initialized():
        return
    if HAS_GPU:
        torch.cuda.set_device(this_device())
    if "RANK" in os.environ:
        dist.init_process_group(BACKEND, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(BACKEND, store=store, rank=0, world_size=1)
