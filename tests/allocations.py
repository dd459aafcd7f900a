"""How much memory a call takes."""

from collections.abc import Callable
from typing import Any

from klear_megatron.platform.allocations import Allocations


def peak_allocation(function: Callable[..., Any], *args: Any) -> int:
    """Most bytes of tensors made by `function(*args)` that are alive at the same time."""
    with Allocations() as allocations:
        function(*args)
    return allocations.peak
