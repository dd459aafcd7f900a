"""Memory against the plan, and tokens per second, of a slice of an 8B model."""

import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from klear_megatron.losses import SFTObjective
from klear_megatron.planning import Work, hardware_here, plan
from klear_megatron.platform.device import HAS_GPU
from klear_megatron.policy.config import PolicyConfig
from tools.gpu_check import models
from tools.gpu_check.outcome import FailedError, NotHereError, Numbers

_STEPS = 4
_KERNELS = 8
"""So many of the longest are named."""
_PLANNED = 0.15
"""How far the measured memory may be from the plan's, relative."""


def _policy(folder: Path, sizes: models.Sizes, recipe: str | None) -> PolicyConfig:
    path = models.write_model(folder / "hf", models.config_of(sizes))
    settings = {"recompute_granularity": "selective", "recompute_modules": ["mlp"], "fp8": recipe}
    config = models.policy(path, sizes, **settings)
    models.need_recipe(config)
    return config


def memory(folder: Path, *, sizes: models.Sizes, recipe: str | None) -> Numbers:
    """The most memory of a step, against the plan."""
    config = _policy(folder, sizes, recipe)
    hardware = hardware_here()
    planned = plan(config, Work(sizes.tokens), gpus=1, hardware=hardware)
    # torch does not count CUDA's own context, which the plan's overhead has in it.
    expected = planned.memory.total - round(hardware.overhead_bytes)
    numbers: Numbers = {"planned_gib": expected / 2**30}
    if not HAS_GPU:
        raise NotHereError(f"the plan says {numbers['planned_gib']:.2f} GiB; no GPU to measure")
    learner, batch = models.make_learner(config), models.random_batch(sizes)
    for _ in range(2):
        learner.train_step(batch, SFTObjective())
    numbers["measured_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if abs(numbers["measured_gib"] / numbers["planned_gib"] - 1) > _PLANNED:
        raise FailedError(f"more than {_PLANNED:.0%} from the plan", numbers)
    return numbers


def speed(folder: Path, *, sizes: models.Sizes, recipe: str | None) -> Numbers:
    """Tokens per second, MFU by the peak of the precision, and where the time goes."""
    config = _policy(folder, sizes, recipe)
    planned = plan(config, Work(sizes.tokens), gpus=1, hardware=hardware_here())
    learner, batch = models.make_learner(config), models.random_batch(sizes)
    times, losses = [], []
    for _ in range(_STEPS):
        start = time.perf_counter()
        losses.append(learner.train_step(batch, SFTObjective())["loss"])
        times.append(time.perf_counter() - start)
    seconds = min(times[1:])
    numbers: Numbers = {
        "tokens/s": sum(sizes.tokens) / seconds,
        "MFU": planned.model_flops / seconds / planned.peak_flops,
        "planned tokens/s": planned.tokens_per_second_per_gpu,
        "loss": losses[-1],
        "kernels": _kernels(learner, batch),
    }
    if not losses[-1] < losses[0]:
        raise FailedError("the loss does not fall", numbers)
    return numbers


def _kernels(learner: Any, batch: Any) -> str:
    """The kernels that take the longest in a step, with their shares of all kernels' time."""
    activities = [ProfilerActivity.CUDA] if HAS_GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        learner.train_step(batch, SFTObjective())
    device = "self_device_time_total" if HAS_GPU else "self_cpu_time_total"
    times = {row.key: float(getattr(row, device)) for row in profiled.key_averages()}
    longest = sorted(times, key=lambda name: -times[name])[:_KERNELS]
    return ", ".join(f"{name[:60]} {times[name] / sum(times.values()):.0%}" for name in longest)
