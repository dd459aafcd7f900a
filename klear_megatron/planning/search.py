"""All layouts of a number of GPUs: those that fit, the fastest first, and why the others do not."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from klear_megatron.errors import UserError
from klear_megatron.planning.hardware import Hardware
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.plan import Plan, check_lengths, plan
from klear_megatron.planning.work import Work
from klear_megatron.policy.config import ParallelConfig, PolicyConfig

_MOST_VIRTUAL_STAGES = 6
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    {"recompute_granularity": "full"},
)
_RECOMPUTE_EXPERTS: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    {"recompute_granularity": "full"},
)


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    fitting: list[Plan]
    """The fastest first."""
    nearest: list[Plan]
    """Layouts that do not fit, the one that lacks the least first."""
    reasons: Counter[str]
    """Of the layouts that do not fit: which kind of memory is the largest -> how many."""


def search(
    policy: PolicyConfig,
    work: Work,
    *,
    gpus: int,
    hardware: Hardware,
    model: PlannedModel | None = None,
    reference: bool = False,
) -> Found:
    """Tries every layout that the model can be cut into, with the least recomputation that fits.

    A micro-batch is one of the longest sequences, cut over context-parallel ranks. Every
    data-parallel rank has a sequence. The other settings of the policy stay.

    Args:
        model, reference: as `plan` takes them.

    Raises:
        UserError: an unknown model, or sequences beyond its positions.
    """
    model = PlannedModel.read(policy.hf_folder) if model is None else model
    check_lengths(work, model)
    found = Found([], [], Counter())
    for parallel in _layouts(policy.parallel, model, work, gpus):
        for recompute in _RECOMPUTE_EXPERTS if model.num_experts else _RECOMPUTE:
            budget = -(-max(work.lengths) // parallel.context_parallel_size)
            settings = {**recompute, "tokens_per_micro_batch": budget, "parallel": parallel}
            candidate = policy.model_copy(update=settings)
            try:
                planned = plan(
                    candidate,
                    work,
                    gpus=gpus,
                    hardware=hardware,
                    model=model,
                    reference=reference,
                    roughly=True,
                )
            except UserError:
                break  # cannot be cut so
            if planned.fits:
                found.fitting.append(planned)
                break  # more recomputation only costs time
        else:
            found.nearest.append(planned)
            found.reasons[largest_kind(planned)] += 1
    found.fitting.sort(key=lambda planned: planned.seconds.total)
    found.nearest.sort(key=lambda planned: planned.memory.total)
    return found


def largest_kind(planned: Plan) -> str:
    """The kind of memory that a layout needs the most of."""
    kinds = {kind: size for kind, size in planned.memory_bytes.items() if kind != "total"}
    return max(kinds, key=kinds.__getitem__)


def _layouts(
    settings: ParallelConfig, model: PlannedModel, work: Work, gpus: int
) -> Iterator[ParallelConfig]:
    powers = [2**n for n in range(gpus.bit_length()) if gpus % 2**n == 0]
    for tp, cp, pp in itertools.product(powers, repeat=3):
        data_parallel, rest = divmod(gpus, tp * cp * pp)
        if rest or model.groups % tp or data_parallel > len(work.lengths):
            continue
        for stages, ep in itertools.product(_stages(model.layers, pp), powers):
            if (
                model.num_experts % ep == 0
                and gpus % (pp * ep) == 0
                and (ep == 1 or model.num_experts)
            ):
                yield settings.model_copy(
                    update={
                        "tensor_model_parallel_size": tp,
                        "context_parallel_size": cp,
                        "pipeline_model_parallel_size": pp,
                        **stages,
                        "expert_model_parallel_size": ep,
                        "expert_tensor_parallel_size": 1 if ep > 1 else None,
                        "overlap_grad_reduce": True,
                        "overlap_param_gather": True,
                    }
                )


def _stages(layers: int, pp: int) -> Iterator[dict[str, int | None]]:
    """How a pipeline can share the layers."""
    each, missing = -(-layers // pp), -layers % pp
    first, last = each - missing // 2, each - (missing - missing // 2)
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    if missing:  # the first and the last stage, which have more to do besides, get fewer
        if min(first, last) > 0:
            sizes = dict(zip(names, (first, last), strict=True))
            yield {"virtual_pipeline_model_parallel_size": None, **sizes}
        return
    for virtual in _virtual(each) if pp > 1 else (1,):
        chunks = virtual if virtual > 1 else None
        yield {"virtual_pipeline_model_parallel_size": chunks, **dict.fromkeys(names)}


def _virtual(layers: int) -> set[int]:
    """One virtual stage, or the largest usual number that divides a stage's layers."""
    return {1, max(n for n in range(1, _MOST_VIRTUAL_STAGES + 1) if layers % n == 0)}
