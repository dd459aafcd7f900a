"""One point, as its ranks measure it: the learner of a training run, on random tokens."""

import contextlib
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.distributed as dist

from klear_megatron import __version__
from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.errors import UserError
from klear_megatron.losses import SFTObjective
from klear_megatron.planning import Hardware, Plan, Work, hardware_here, plan
from klear_megatron.platform.allocations import Allocations
from klear_megatron.platform.device import HAS_GPU, init_distributed, this_device
from klear_megatron.platform.exit_codes import BAD_INPUT
from klear_megatron.platform.torchrun import LastWords
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.config import import_extensions
from klear_megatron.policy.learner import Learner
from klear_megatron.scaling.config import Point, ScalingConfig
from klear_megatron.scaling.results import (
    MEASURED,
    OUT_OF_MEMORY,
    Row,
    read_kept,
    record,
    record_out_of_time,
)

_NO_HOST_MEMORY = "can't allocate memory"
"""How torch's allocator says it on a CPU."""


def measure_point(config: ScalingConfig, point: Point) -> None:
    """Collective. Measures a point and records it, unless it has a result already.

    A rank that runs out of memory or time records that, and ends with an error, which ends the
    others.

    Raises:
        UserError: a rank has run out of memory, or the number of ranks is not the point's.
    """
    if read_kept(config, point) is None:
        with _in_time(config, point):
            _measure_and_record(config, point)


@contextlib.contextmanager
def _in_time(config: ScalingConfig, point: Point) -> Iterator[None]:
    """Ends this process with code 2 when the point takes too long."""

    def end() -> None:
        row = record_out_of_time(config, point, _environment())
        LastWords(f"{point.name}: {row['outcome']}: {row['reason']}", BAD_INPUT).leave()
        os._exit(BAD_INPUT)

    timer = threading.Timer(config.time_limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _measure_and_record(config: ScalingConfig, point: Point) -> None:
    import_extensions(point.policy)
    init_distributed()
    if dist.get_world_size() != point.ranks:
        raise UserError(f"{point.name}: of {point.ranks} ranks, not of {dist.get_world_size()}")
    try:
        numbers = _measure(config, point)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _lacks_memory(error):
            raise
        reason = str(error).splitlines()[0]
        record(config, point, OUT_OF_MEMORY, reason, _environment())
        raise UserError(f"{point.name}: out of memory: {reason}") from error
    if dist.get_rank() == 0:
        record(config, point, MEASURED, "", numbers | _environment())


def _lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _NO_HOST_MEMORY in str(error)


def _measure(config: ScalingConfig, point: Point) -> Row:
    """Trains for a few steps; returns what was measured, and what was planned.

    Memory is of the rank that needs the most: on a GPU, the peak of PyTorch's allocator; on a CPU,
    that of the tensors until the end of the first step. Only that step counts tensors, which makes
    it slower, and it is not timed.
    """
    hardware = hardware_here()
    planned = plan(point.policy, Work(point.lengths), gpus=point.ranks, hardware=hardware)
    batch = _random_batch(config, point)
    with _watched(config.memory_limit_gib) as memory:
        learner = Learner(
            point.policy,
            ModelFolder(point.policy.hf_folder),
            total_steps=config.steps + 1,
            seed=config.seed,
        )
        learner.train_step(batch, SFTObjective())
    seconds = [_seconds(learner, batch) for _ in range(config.steps)]
    peak = torch.cuda.max_memory_allocated() if HAS_GPU else memory.peak
    most = torch.tensor(peak, device=this_device())
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return _numbers(planned, hardware, seconds, int(most), point)


@contextlib.contextmanager
def _watched(limit_gib: float | None) -> Iterator[Allocations]:
    """Holds the device to the limit; on a CPU, counts tensors."""
    limit = None if limit_gib is None else limit_gib * 2**30
    counted = Allocations(limit)
    if HAS_GPU:
        if limit is not None:
            total = torch.cuda.get_device_properties(this_device()).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        yield counted
    else:
        with counted:
            yield counted


def _random_batch(config: ScalingConfig, point: Point) -> Batch:
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = ModelFolder(point.policy.hf_folder).config.vocab_size
    shape = (sum(point.lengths),)
    tokens = torch.randint(vocabulary, shape, generator=generator, dtype=torch.int32)
    return Batch(tokens, list(point.lengths), {"loss_mask": torch.ones(shape)})


def _seconds(learner: Learner, batch: Batch) -> float:
    """The time of one step, until the last rank has ended it."""
    dist.barrier()
    start = time.perf_counter()
    learner.train_step(batch, SFTObjective())
    if HAS_GPU:
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def _numbers(
    planned: Plan, hardware: Hardware, steps: list[float], memory: int, point: Point
) -> Row:
    seconds = statistics.median(steps)
    speedup = planned.seconds.total / seconds
    return {
        "seconds": seconds,
        "tokens_per_second_per_gpu": sum(point.lengths) / seconds / point.ranks,
        "model_tflops_per_gpu": planned.model_tflops_per_gpu * speedup,
        "mfu": planned.mfu * speedup,
        "memory_bytes": memory,
        "planned_seconds": planned.seconds.total,
        "planned_tokens_per_second_per_gpu": planned.tokens_per_second_per_gpu,
        "planned_mfu": planned.mfu,
        # The driver's and the libraries' own memory is not in what is measured.
        "planned_memory_bytes": planned.memory.total - round(hardware.overhead_bytes),
        "planned": planned.as_json(),
        "hardware": hardware.model_dump(mode="json"),
        "step_seconds": steps,
    }


def _environment() -> Row:
    """What decides a measurement besides the settings."""
    return {
        "device": torch.cuda.get_device_name() if HAS_GPU else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "klear_megatron": __version__,
        **{name: version(name) for name in ("torch", "megatron-core", "transformers")},
    }
