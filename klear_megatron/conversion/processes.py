"""The processes that share a conversion: this one alone, or those of torchrun."""

import os
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of how many this is."""

    rank: int
    size: int

    @classmethod
    def join(cls) -> "Processes":
        """The processes torchrun started, or this one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(int(os.environ.get("RANK", "0")), size)

    def wait(self) -> None:
        """For all of them to get here."""
        if self.size > 1:
            dist.barrier()
