"""Will it fit, and how long will a step take: the plan of one layout."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from klear_megatron.errors import UserError
from klear_megatron.planning.activations import Activations
from klear_megatron.planning.hardware import Hardware
from klear_megatron.planning.layout import Layout
from klear_megatron.planning.memory import Memory, rank_memory
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.state import Formats, StateBytes, default_bucket, state_bytes
from klear_megatron.planning.state import roughly as state_of_stage
from klear_megatron.planning.step_time import StepSeconds, StepTime
from klear_megatron.planning.work import Work
from klear_megatron.policy.config import PolicyConfig
from klear_megatron.policy.kernels import Kernels, choose_kernels, choose_offload
from klear_megatron.policy.packing import plan_micro_batches


@dataclass(frozen=True)
class Plan:
    """What a layout needs, and how fast it is."""

    policy: PolicyConfig
    """With this layout."""
    gpus: int
    layout: dict[str, Any]
    memory: Memory
    """Of the rank that needs the most."""
    worst_rank: int
    available_bytes: float
    seconds: StepSeconds
    """Of one optimizer step."""
    forward_seconds: float
    """Of a forward alone over the same tokens, as for old log-probabilities."""
    tokens: int
    model_flops: float
    peak_flops: float
    """Of one GPU, in the precision of the matrix products."""

    @property
    def fits(self) -> bool:
        """Whether the rank that needs the most has room."""
        return self.memory.total <= self.available_bytes

    @property
    def memory_bytes(self) -> dict[str, int]:
        """By kind, and `total`; `reference` only if there is one."""
        kinds: dict[str, int] = asdict(self.memory)
        if not kinds["reference"]:
            del kinds["reference"]
        return {**kinds, "total": self.memory.total}

    @property
    def step_seconds(self) -> dict[str, float]:
        return {**asdict(self.seconds), "total": self.seconds.total}

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.seconds.total / self.gpus

    @property
    def model_tflops_per_gpu(self) -> float:
        """Without recomputation, and with attention halved for causality."""
        return self.model_flops / self.seconds.total / self.gpus / 1e12

    @property
    def mfu(self) -> float:
        """`model_tflops_per_gpu` over the peak."""
        return self.model_tflops_per_gpu * 1e12 / self.peak_flops

    def as_json(self) -> dict[str, Any]:
        """What `klear-megatron plan --json` prints. Other programs read these names."""
        return {
            "layout": self.layout,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "model_tflops_per_gpu": self.model_tflops_per_gpu,
            "mfu": self.mfu,
        }


def plan(
    policy: PolicyConfig,
    work: Work,
    *,
    gpus: int,
    hardware: Hardware,
    model: PlannedModel | None = None,
    reference: bool = False,
    fused: bool = False,
    roughly: bool = False,
) -> Plan:
    """The plan of a policy's layout over so many GPUs.

    Args:
        model: the policy's, if it has been read already.
        reference: whether there is a second model for a KL penalty, which is not trained.
        fused: plan for a loss in one kernel and for dispatch that sends a token to a node once, as
            published pre-training runs have. Ours computes log-probabilities in chunks, and sends a
            token once to each of its experts.
        roughly: leave out the padding of weights, gradients and optimizer state, for speed.

    Raises:
        UserError: an unknown model, a layout that cannot be, or sequences beyond its positions.
    """
    model = model or PlannedModel.read(policy.hf_folder)
    policy.parallel.check_model(model)
    layout = Layout(policy.parallel, gpus)
    check_lengths(work, model)
    kernels = choose_kernels(policy, hardware.installed, experts=model.num_experts > 0)
    packs = packed(work.lengths, policy, layout, kernels)
    activations = Activations.of(policy, model, layout, kernels)
    worst, memory, state = _worst_rank(
        policy, model, layout, kernels, activations, packs, hardware, reference, roughly
    )
    fp8 = kernels.transformer["fp8"] is not None
    time = StepTime(model, layout, activations, hardware, fp8=fp8, fused=fused)
    return Plan(
        policy=policy,
        gpus=gpus,
        layout=describe(policy, layout),
        memory=memory,
        worst_rank=worst,
        available_bytes=hardware.memory,
        seconds=time.step(packs, state),
        forward_seconds=time.forward(packs),
        tokens=work.tokens,
        model_flops=model.model_flops(work.lengths),
        peak_flops=time.peak,
    )


def packed(
    lengths: Sequence[int], policy: PolicyConfig, layout: Layout, kernels: Kernels
) -> list[list[tuple[int, ...]]]:
    """For each data-parallel rank, the padded lengths of each micro-batch, as the run packs."""
    cp = layout.cp
    align = layout.tp * (2 * cp if cp > 1 else 1) * kernels.token_multiple
    multiple = layout.pp if layout.vpp > 1 else 1
    plan = _packs(tuple(lengths), layout.dp, policy.tokens_per_micro_batch * cp, multiple)
    return [
        [tuple(math.ceil(lengths[i] / align) * align for i in pack) or (align,) for pack in rank]
        for rank in plan
    ]


@lru_cache(maxsize=64)
def _packs(
    lengths: tuple[int, ...], data_parallel: int, budget: int, multiple_of: int
) -> list[list[list[int]]]:
    return plan_micro_batches(lengths, data_parallel, budget, multiple_of)


def describe(policy: PolicyConfig, layout: Layout) -> dict[str, Any]:
    """The layout under the names that plans are printed with."""
    recompute: str = policy.recompute_granularity or "none"
    if recompute == "selective":
        recompute += ": " + ", ".join(policy.recompute_modules)
    return {
        "tensor_parallel": layout.tp,
        "context_parallel": layout.cp,
        "pipeline_parallel": layout.pp,
        "virtual_pipeline": layout.vpp,
        "expert_parallel": layout.ep,
        "expert_tensor_parallel": layout.etp,
        "data_parallel": layout.dp,
        "recompute": recompute,
        "dtype": policy.dtype,
        "fp8": policy.fp8,
        "tokens_per_micro_batch": policy.tokens_per_micro_batch,
        "offload_fraction": policy.optimizer.offload_fraction,
    }


def formats(policy: PolicyConfig, kernels: Kernels, hardware: Hardware) -> Formats:
    """How the run keeps its weights and its optimizer's state."""
    element = 4 if policy.dtype == "float32" else 2
    offload, _ = choose_offload(policy.optimizer, hardware.installed)
    fused = hardware.installed.transformer_engine or hardware.installed.apex
    return Formats(
        element,
        1 if kernels.fp8_param_gather else element,
        step_bytes=0 if fused else 4,
        offload=offload,
    )


def _worst_rank(
    policy: PolicyConfig,
    model: PlannedModel,
    layout: Layout,
    kernels: Kernels,
    activations: Activations,
    packs: list[list[tuple[int, ...]]],
    hardware: Hardware,
    reference: bool,
    roughly: bool,
) -> tuple[int, Memory, StateBytes]:
    """The first rank of the pipeline stage that needs the most, with the data-parallel rank that
    has the largest pack."""
    bucket = default_bucket(layout.dp) if policy.parallel.overlap_grad_reduce else None
    largest = max(range(layout.dp), key=lambda rank: max(sum(pack) for pack in packs[rank]))
    kept = formats(policy, kernels, hardware)
    found = []
    # In between, stages have fewer micro-batches in flight, and neither embedding nor logits.
    for stage in {0, layout.pp - 1} if roughly else range(layout.pp):
        rank = (stage * layout.dp + largest) * layout.cp * layout.tp
        place = layout.place(rank)
        unpadded = state_of_stage(model, layout, stage, kept)
        state = unpadded if roughly else state_bytes(model, layout, place, kept, bucket)
        memory = rank_memory(
            model, layout, place, state, activations, packs[largest], hardware.overhead_bytes
        )
        if reference:
            memory = replace(memory, reference=unpadded.weights)
        found.append((rank, memory, state))
    return max(found, key=lambda of_one: of_one[1].total)


def check_lengths(work: Work, model: PlannedModel) -> None:
    """Checks that the model has positions for the longest sequence.

    Raises:
        UserError: it has not.
    """
    longest = max(work.lengths)
    if longest > model.positions:
        raise UserError(
            f"a sequence of {longest} tokens is beyond the model's max_position_embeddings = "
            f"{model.positions}; plan a shorter one, or extend the model's config.json by YaRN"
        )
