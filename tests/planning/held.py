"""What a rank holds, and what was planned for it."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.planning.layout import Layout
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.state import Formats, state_bytes
from klear_megatron.policy.learner import Learner


def held_state(learner: Learner) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of this rank: unique storages."""
    buffers = [b for m in learner.model.modules for b in [*m.buffers, *m.expert_parallel_buffers]]
    parameters = [p for m in learner.model.modules for p in m.parameters()]
    state = []
    for part in learner._optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for tensors in part.optimizer.state.values():
            state += list(tensors.values())
        state += [p for group in part.optimizer.param_groups for p in group["params"]]
    weights = _storages([*parameters, *(buffer.param_data for buffer in buffers)])
    gradients = _storages(buffer.grad_data for buffer in buffers)
    optimizer = {ptr: n for ptr, n in _storages(state).items() if ptr not in weights}
    return sum(weights.values()), sum(gradients.values()), sum(optimizer.values())


def planned_state(learner: Learner, bucket: int | None = None) -> tuple[int, ...]:
    """The same three numbers, planned."""
    config, model = learner.config, PlannedModel.read(learner.config.path)
    layout = Layout(config.parallel, dist.get_world_size())
    element = 4 if config.dtype == "float32" else 2
    formats = Formats(element, element)
    state = state_bytes(model, layout, layout.place(dist.get_rank()), formats, bucket)
    return state.weights, state.gradients, state.optimizer


def _storages(tensors: Any) -> dict[int, int]:
    storages = [t.untyped_storage() for t in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


class _Saved:
    """A tensor as autograd keeps it; it is gone when autograd drops it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved_by_autograd(learner: Learner) -> Iterator[Counter[str]]:
    """Counts, under "peak", the most bytes that autograd has saved at a time: unique storages,
    without the weights'."""
    weights = _storages(p for m in learner.model.modules for p in m.parameters())
    uses: Counter[int] = Counter()
    count: Counter[str] = Counter()

    def pack(tensor: Tensor) -> _Saved:
        saved, storage = _Saved(tensor), tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer not in weights:
            if not uses[pointer]:
                count["alive"] += size
                count["peak"] = max(count["peak"], count["alive"])
            uses[pointer] += 1
            weakref.finalize(saved, drop, pointer, size)
        return saved

    def drop(pointer: int, size: int) -> None:
        uses[pointer] -= 1
        if not uses[pointer]:
            count["alive"] -= size

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield count
