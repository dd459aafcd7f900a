"""Sums over the ranks that hold parts of the same sequences."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def sum_over_context_parallel_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, on all of them, differentiable.

    Collective over context-parallel ranks, as is its backward. Each rank's part of the loss may use
    the sum, so the gradient of what a rank puts in is the sum of all ranks' gradients.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values
    total: Tensor = _SumOverRanks.apply(values, group)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
