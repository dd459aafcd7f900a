"""How much memory a piece of code takes: the tensors it makes, whatever the kernel reports."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is active.

    Each storage counts once. Scratch memory inside one operation is not seen. Every operation gets
    slower, so do not time what runs inside.

    Args:
        limit: bytes; an operation that takes more raises `MemoryError`.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes that were alive at the same time."""
        self._limit = limit
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
        alive = sum(nbytes for _, nbytes in self._alive.values())
        self.peak = max(self.peak, alive)
        if self._limit is not None and alive > self._limit:
            raise MemoryError(
                f"{alive / 2**30:.2f} GiB of tensors, more than {self._limit / 2**30:.2f} GiB"
            )
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """The storages of the plain tensors; Megatron-Core's wrappers have no storage of their own."""
    plain = (torch.Tensor, torch.nn.Parameter)
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if type(leaf) in plain]
