"""Plans as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from klear_megatron.planning.plan import Plan
from klear_megatron.planning.run import PlannedRun
from klear_megatron.planning.search import Found, largest_kind
from klear_megatron.planning.servers import ServerPlan

_SHOWN = 10


def describe_plan(planned: Plan) -> Iterator[str]:
    """Lines: the layout, memory and time by kind."""
    work = f"{planned.tokens} tokens per optimizer step on {planned.gpus} GPUs"
    yield f"layout            {short_layout(planned.layout)}; {work}"
    yield f"memory            of rank {planned.worst_rank}, which needs the most"
    for kind, size in planned.memory_bytes.items():
        yield f"  {kind:15} {_gib(size)}"
    yield f"  {'available':15} {_gib(planned.available_bytes)}"
    yield f"  {'':15} {'it fits' if planned.fits else shortage(planned)}"
    yield "optimizer step"
    for kind, seconds in planned.step_seconds.items():
        yield f"  {kind:15} {seconds:9.3f} s"
    yield f"tokens/s/GPU      {planned.tokens_per_second_per_gpu:.1f}"
    yield (
        f"model TFLOP/s/GPU {planned.model_tflops_per_gpu:.1f} (attention halved for causality), "
        f"MFU {planned.mfu:.1%}"
    )


def shortage(planned: Plan) -> str:
    """Why a plan does not fit, with the arithmetic."""
    kinds = " + ".join(
        f"{kind} {size / 2**30:.2f}"
        for kind, size in planned.memory_bytes.items()
        if kind != "total"
    )
    lacking = planned.memory.total - planned.available_bytes
    return (
        f"it does not fit: {kinds} = {planned.memory.total / 2**30:.2f} GiB, of "
        f"{planned.available_bytes / 2**30:.2f} GiB: {lacking / 2**30:.2f} GiB too much"
    )


def refusal(planned: Plan) -> str:
    """Why a run whose plan does not fit is not started, and what to do."""
    return (
        f"policy: {shortage(planned)}. `klear-megatron plan --search` finds layouts that fit; "
        "start_without_room: true starts all the same"
    )


def describe_rl(run: PlannedRun, planned: Plan, servers: ServerPlan) -> Iterator[str]:
    """Lines on the servers and on the parts of an RL step that are no optimizer step."""
    rollout, held = run.rollout, servers.sequences
    size = rollout.tensor_parallel_size
    yield f"servers           {rollout.servers} of {size} GPUs; of each GPU:"
    yield f"  {'weights':15} {_gib(servers.weights_bytes)}"
    yield f"  {'KV cache':15} {_gib(servers.cache_bytes)}: {held} sequences of {run.longest} tokens"
    yield "step"
    parts = rl_step_seconds(run, planned, servers)
    for name, seconds in parts.items():
        yield f"  {name:15} {seconds:9.3f} s"
    yield f"  {'total':15} {sum(parts.values()):9.3f} s"


def rl_step_seconds(run: PlannedRun, planned: Plan, servers: ServerPlan) -> dict[str, float]:
    """Seconds of an RL step by part, every response as long as allowed."""
    steps = run.optimizer_steps
    return {
        "generation": servers.generation_seconds,
        "old log-probs": planned.forward_seconds * steps * (run.old_log_probs == "trainer"),
        "reference": planned.forward_seconds * steps * run.has_reference,
        "training": planned.seconds.total * steps,
        "push": servers.push_seconds,
    }


def describe_cost(
    gpus: int, seconds: float, steps: int | None, price: float | None
) -> Iterator[str]:
    """Lines: GPU hours and money, of a step and of a run of so many steps."""
    for name, number in (("step", 1), ("run", steps)):
        if number is not None:
            hours = gpus * seconds * number / 3600
            money = f", {hours * price:.2f} in money" if price is not None else ""
            yield f"GPU hours per {name}{'':{4 - len(name)}} {hours:.2f}{money}"


def describe_search(found: Found) -> Iterator[str]:
    """Lines: the fastest layouts that fit, and why the others do not."""
    tried = len(found.fitting) + len(found.nearest)
    yield f"{len(found.fitting)} of {tried} layouts fit; the fastest:"
    for planned in found.fitting[:_SHOWN]:
        yield (
            f"  {short_layout(planned.layout):64} {planned.memory.total / 2**30:6.1f} GiB "
            f"{planned.seconds.total:9.2f} s  {planned.tokens_per_second_per_gpu:8.0f} tokens/s/GPU"
            f"  MFU {planned.mfu:.0%}"
        )
    if found.nearest:
        reasons = ", ".join(f"{kind} in {n}" for kind, n in found.reasons.most_common())
        yield f"{len(found.nearest)} do not fit even with full recomputation; most is {reasons}:"
    for planned in found.nearest[:3]:
        lacking = (planned.memory.total - planned.available_bytes) / 2**30
        yield (
            f"  {short_layout(planned.layout):64} {lacking:6.1f} GiB too much, "
            f"{largest_kind(planned)} {planned.memory_bytes[largest_kind(planned)] / 2**30:.1f} GiB"
        )


def short_layout(layout: Mapping[str, Any]) -> str:
    """A plan's layout, such as `TP 2, CP 4, DP 8, recompute selective: mlp`."""
    names = {
        "TP": "tensor_parallel",
        "CP": "context_parallel",
        "PP": "pipeline_parallel",
        "VPP": "virtual_pipeline",
        "EP": "expert_parallel",
        "DP": "data_parallel",
    }
    sizes = [f"{short} {layout[name]}" for short, name in names.items() if layout[name] > 1]
    return ", ".join([*sizes, f"recompute {layout['recompute']}"])


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"
