"""Lets unmodified Megatron-Core run where there is no GPU.

Megatron-Core asks for CUDA by name (`device="cuda"`, `.cuda()`, `torch.cuda.current_device()`) but
computes nothing that a CPU cannot. A `TorchFunctionMode`, PyTorch's own extension point, turns
every such request into one for the CPU; `torch.cuda`'s bookkeeping functions get answers that are
right for a CPU; and the random-state tracker works on the CPU generator.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_torch_all_gather, _torch_reduce_scatter = dist.all_gather, dist.reduce_scatter


def _on_cpu(device: Any) -> Any:
    return _CPU if device is not None and str(device).startswith("cuda") else device


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        if kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            # The optimizers recognise a parameter's dtype by the name "torch.cuda.FloatTensor".
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A CUDA stream or event; on a CPU everything happens in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: "_Stream") -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or self

    def record(self, stream: "_Stream | None" = None) -> None: ...

    def wait(self, stream: "_Stream | None" = None) -> None: ...


@functools.cache
def install() -> None:
    """Puts the stand-ins in place, once, for this thread and the rest of the process."""
    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "Stream": _Stream,
        "Event": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    _CudaMeansCpu().__enter__()
    _track_cpu_random_states()
    _dispatch_experts_on_cpu()


def _track_cpu_random_states() -> None:
    from megatron.core.tensor_parallel import random

    class CpuRandomStates(random.CudaRNGStatesTracker):  # type: ignore[misc]
        """Megatron-Core's tracker of named random states, over the CPU's one generator."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random.CudaRNGStatesTracker = CpuRandomStates
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _all_gather(
    pieces: list[torch.Tensor], mine: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    if len({len(piece) for piece in pieces}) == 1:
        return _torch_all_gather(pieces, mine, group, async_op)
    longest = max(len(piece) for piece in pieces)
    padded = [mine.new_zeros(longest, *mine.shape[1:]) for _ in pieces]
    sent = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
    _torch_all_gather(padded, sent, group)
    for piece, row in zip(pieces, padded, strict=True):
        piece.copy_(row[: len(piece)])
    return None


def _reduce_scatter(
    mine: torch.Tensor,
    pieces: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    if len({len(piece) for piece in pieces}) == 1:
        return _torch_reduce_scatter(mine, pieces, op, group, async_op)
    whole = torch.cat(pieces)
    dist.all_reduce(whole, op, group)
    mine.copy_(whole.split([len(piece) for piece in pieces])[dist.get_rank(group)])
    return None


def _dispatch_experts_on_cpu() -> None:
    """Does for mixtures of experts what Megatron-Core does only for tensors on a GPU.

    It also adds collectives over lists of tensors of different sizes, which gloo lacks.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    for name, collective in {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}.items():
        setattr(dist, name, collective)
    # The router's code uses this name, which only Transformer Engine defines.
    moe_utils.te_general_gemm = None
