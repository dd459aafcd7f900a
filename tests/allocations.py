"""How much memory a piece of code takes: the tensors it makes, whatever the kernel reports."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def peak_allocation(function: Callable[..., Any], *args: Any) -> int:
    """Most bytes of tensors made by `function(*args)` that are alive at the same time."""
    with _Allocations() as allocations:
        function(*args)
    return allocations.peak
