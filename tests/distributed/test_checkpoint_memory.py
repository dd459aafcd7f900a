"""Saving and loading a checkpoint takes no more memory than a rank's own part of the state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klear_megatron.losses import SFTObjective
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.distributed.reference import make_batch


class _Allocations(TorchDispatchMode):
    """Bytes of the tensors that were made while it is active, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Those of plain tensors; Megatron-Core's wrappers have none of their own."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if type(leaf) in plain]


def _peak(function: Callable[..., Any], *args: Any) -> int:
    with _Allocations() as allocations:
        function(*args)
    return allocations.peak


def _save_and_load(model: Path, path: Path) -> tuple[int, int, int, int]:
    learner = make_learner(model, dtype="bfloat16")
    learner.train_step(make_batch([9, 30], [True] * 2, 0), SFTObjective())
    parameters = sum(p.numel() for chunk in learner.model.chunks for p in chunk.parameters())
    largest = max(p.numel() for chunk in learner.model.chunks for p in chunk.parameters())
    saving = _peak(learner.save, path, {})
    return parameters, largest, saving, _peak(learner.load, path)


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
def test_a_rank_needs_memory_for_its_own_part(data_parallel, folder, tmp_path):
    ranks = run_ranks(data_parallel, _save_and_load, folder / "untied", tmp_path / "checkpoint")
    for parameters, largest, saving, loading in ranks:
        weights, optimizer = 2 * parameters, 12 * parameters // data_parallel
        one_tensor = 3 * 4 * largest  # what is read at a time, and how uneven the division may be
        assert saving <= weights // data_parallel + optimizer + one_tensor
        # Weights that another rank has read arrive in a buffer; gate and up are put together.
        assert loading <= 2 * weights + one_tensor
