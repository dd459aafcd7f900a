"""The hardware that this process runs on."""

import importlib.util
import time
from collections.abc import Callable

from klear_megatron.errors import UserError
from klear_megatron.planning.hardware import Efficiency, Hardware, Peak, read_hardware

_NAMES = {"GB200": "gb200", "B200": "b200", "H200": "h200", "H100": "h100", "A100": "a100"}
"""What a GPU calls itself -> its name here."""
_SIDE = 512
_COPY_BYTES = 2**27


def hardware_here() -> Hardware:
    """This machine: its GPU by name, or one rank's share of its CPU, measured in half a second.

    On a CPU, the rank's share of the memory is by LOCAL_WORLD_SIZE; matrix products and attention
    run at what was measured, and ranks exchange through memory.

    Raises:
        UserError: a GPU whose numbers are not known.
    """
    import torch

    from klear_megatron.policy.kernels import Installed

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = [ours for theirs, ours in _NAMES.items() if theirs in name]
        if not known:
            raise UserError(f"{name}: unknown GPU; describe it in a YAML file for plan --gpu")
        here = Installed.here()
        return read_hardware(known[0]).model_copy(
            update={
                "memory": float(torch.cuda.get_device_properties().total_memory),
                "transformer_engine": here.transformer_engine,
                "apex": here.apex,
            }
        )
    return _cpu()


def _cpu() -> Hardware:
    import psutil
    import torch

    from klear_megatron.platform.device import ranks_on_this_host

    def matrix(dtype: torch.dtype) -> float:
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        return 2 * _SIDE**3 / _seconds(lambda: a @ a)

    source = torch.zeros(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    bandwidth = 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source))
    return Hardware(
        memory=psutil.virtual_memory().total / ranks_on_this_host(),
        bandwidth=bandwidth,
        flops=Peak(float32=matrix(torch.float32), bfloat16=matrix(torch.bfloat16)),
        compute_capability=None,
        node_gpus=ranks_on_this_host(),
        node_link=bandwidth / 4,
        network=bandwidth / 4,
        sources="measured at the start of this process",
        efficiency=Efficiency(matrix=1, matrix_fp8=1, attention=1, expert=1, bandwidth=1),
        overhead_bytes=2**30,
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )


def _seconds(run: Callable[[], object]) -> float:
    """The least of a few runs."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
