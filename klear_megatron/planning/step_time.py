"""Seconds of one optimizer step, by kind.

Each kind is work over what the hardware does of it: FLOPs over a peak times an efficiency, bytes
over a bandwidth. The slowest pipeline stage and the data-parallel rank with the most work count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from klear_megatron.planning.activations import Activations
from klear_megatron.planning.hardware import Hardware
from klear_megatron.planning.layout import Layout
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.state import StateBytes
from klear_megatron.planning.work import Work

_PASSES = 4
"""How often a saved byte crosses memory: written and read in forward; read, and its gradient
written, in backward. Norms, activations and residual sums are bound by this."""
_BYTES_PER_LOGIT = 60
"""Bytes that a logit moves: the softmax and its gradient in chunks, in plain PyTorch."""
_BYTES_PER_FUSED_LOGIT = 16
"""The same where one kernel does it, as in Megatron-LM's pre-training."""
_OPTIMIZER_PASSES = 2.5
"""Bytes that a step moves for each byte of the optimizer's state."""
_HOST_BANDWIDTH = 25e9
"""Bytes/s between a GPU and its host, of both directions; assumed."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one optimizer step by kind."""

    compute: float
    """Matrix products, and what is bound by memory."""
    attention: float
    tensor: float
    context: float
    pipeline_bubble: float
    expert: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True)
class _Micro:
    """Seconds of a micro-batch's forward and backward on the slowest stage."""

    compute: float
    attention: float
    tensor: float
    context: float
    expert: float

    @property
    def total(self) -> float:
        return self.compute + self.attention + self.tensor + self.context + self.expert


class StepTime:
    """How long the micro-batches of one layout take."""

    def __init__(
        self,
        model: PlannedModel,
        layout: Layout,
        activations: Activations,
        hardware: Hardware,
        *,
        fp8: bool,
        fused: bool = False,
    ) -> None:
        self.model, self.layout, self.activations = model, layout, activations
        self.hardware, self.fp8, self.fused = hardware, fp8, fused
        self.efficiency = hardware.efficiency
        self._known: dict[tuple[int, ...], _Micro] = {}
        self.plain_peak = getattr(
            hardware.flops, "float32" if activations.element == 4 else "bfloat16"
        )
        self.peak = (hardware.flops.fp8 if fp8 else None) or self.plain_peak

    def step(self, packs: Sequence[Sequence[tuple[int, ...]]], state: StateBytes) -> StepSeconds:
        """Seconds of a step.

        Args:
            packs: for each data-parallel rank, the padded lengths of each micro-batch.
            state: of the rank that holds the most.
        """
        times = [[self._micro(pack) for pack in rank] for rank in packs]
        slowest = max(times, key=lambda rank: sum(micro.total for micro in rank))
        sums = {
            field.name: sum(getattr(micro, field.name) for micro in slowest)
            for field in fields(_Micro)
        }
        mean = sum(micro.total for micro in slowest) / len(slowest)
        return StepSeconds(
            **sums,
            pipeline_bubble=self._pipeline(packs, mean, len(slowest)),
            data=self._data(state, mean),
            optimizer=self._optimizer(state),
        )

    def forward(self, packs: Sequence[Sequence[tuple[int, ...]]]) -> float:
        """Seconds of a forward without backward, such as old log-probabilities take."""
        per_rank = [sum(self._micro(pack).total for pack in rank) for rank in packs]
        return max(per_rank) / (4 if self.activations.recompute.full else 3)

    def _micro(self, pack: tuple[int, ...]) -> _Micro:
        """The times of a micro-batch with these padded lengths."""
        if pack not in self._known:
            self._known[pack] = self._compute_micro(Work(pack))
        return self._known[pack]

    def _compute_micro(self, work: Work) -> _Micro:
        layers = max(
            sum(len(chunk.layers) for chunk in self.layout.chunks(stage, self.model.layers))
            for stage in range(self.layout.pp)
        )
        compute = layers * (self._matrices(work) + self._memory_bound(work))
        attention = layers * self._attention(work)
        logits = self._logits(work)
        if self.layout.pp > 1:  # only the last stage has them
            last = self.layout.chunks(self.layout.pp - 1, self.model.layers)
            here = sum(len(chunk.layers) for chunk in last)
            logits = max(0.0, logits - (layers - here) * (compute + attention) / max(layers, 1))
        return _Micro(
            compute + logits,
            attention,
            layers * self._tensor(work),
            layers * self._context(work),
            layers * self._expert(work),
        )

    def _passes(self, module: str) -> int:
        """Forwards that a part of a layer costs: one, two for its backward, one if repeated."""
        recompute = self.activations.recompute
        return 3 + (recompute.full or module in recompute.modules)

    def _matrices(self, work: Work) -> float:
        m, tp, cp = self.model, self.layout.tp, self.layout.cp
        tokens = work.tokens / cp / tp
        dense, experts = m.layer_matrices
        efficiency = self.efficiency.matrix_fp8 if self.fp8 else self.efficiency.matrix
        rate = self.peak * efficiency
        mlp = 0 if m.num_experts else 3 * m.hidden * m.ffn
        seconds = 2 * tokens * ((dense - mlp) * self._passes("") + mlp * self._passes("mlp"))
        seconds += 2 * tokens * experts * self._passes("moe") / self.efficiency.expert
        return seconds / rate

    def _memory_bound(self, work: Work) -> float:
        layer = self.activations.layer(work)
        passes = _PASSES + (2 if self.activations.recompute.full else 0)
        return (layer.kept + layer.again) * passes / self._bandwidth

    @property
    def _bandwidth(self) -> float:
        return self.hardware.bandwidth * self.efficiency.bandwidth

    def _attention(self, work: Work) -> float:
        m = self.model
        squares = sum(length * length for length in work.lengths)
        forward = 2 * squares * m.heads * m.head_dim / (self.layout.tp * self.layout.cp)
        rate = self.plain_peak * self.efficiency.attention
        return forward * self._passes("core_attn") / rate

    def _logits(self, work: Work) -> float:
        m, layout = self.model, self.layout
        tokens = work.tokens / layout.cp
        logits = tokens * m.vocabulary / layout.tp
        kept = min(1.0, 2**27 / logits)
        passes = 3 if self.fused else 4 - kept
        products = 2 * logits * m.hidden * passes / (self.plain_peak * self.efficiency.matrix)
        per_logit = _BYTES_PER_FUSED_LOGIT if self.fused else _BYTES_PER_LOGIT
        return products + logits * per_logit / self._bandwidth

    def _link(self, ranks: int) -> float:
        """Bytes/s per GPU in one direction, among so many neighbouring ranks."""
        hardware = self.hardware
        rate = hardware.node_link if ranks <= hardware.node_gpus else hardware.network
        return rate * self.efficiency.bandwidth

    def _tensor(self, work: Work) -> float:
        """Gathers and scatters of hidden states: four in forward, six in backward; half of them
        around attention, and half around the feed-forward part, unless that has experts."""
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        hidden = work.tokens / self.layout.cp * self.model.hidden * self.activations.element
        number = (10 + (4 if self.activations.recompute.full else 0)) / (
            2 if self.model.num_experts else 1
        )
        return number * hidden * (tp - 1) / tp / self._link(tp)

    def _context(self, work: Work) -> float:
        """Keys and values in forward, those and their gradients in backward. Point-to-point, they
        travel while attention computes with others."""
        m, cp, tp = self.model, self.layout.cp, self.layout.tp
        if cp == 1:
            return 0.0
        keys = 2 * work.tokens * m.groups / tp * m.head_dim * self.activations.element
        times = 3 + (self._passes("core_attn") - 3)
        seconds = times * keys * (cp - 1) / cp / self._link(tp * cp)
        if self.layout.parallel.context_parallel_comm_type == "p2p" and self.activations.engine:
            return max(0.0, seconds - self._attention(work))
        return seconds

    def _expert(self, work: Work) -> float:
        """Tokens to their experts and back, in forward and in backward."""
        m, layout = self.model, self.layout
        ranks = layout.ep * layout.etp
        if not m.num_experts or ranks == 1:
            return 0.0
        token = m.hidden * self.activations.element * layout.etp
        size = work.tokens / layout.cp / layout.tp * token
        nodes = max(1.0, ranks / self.hardware.node_gpus)
        copies = m.experts_per_token
        near, far = copies * (1 / nodes - 1 / ranks), copies * (1 - 1 / nodes)
        if self.fused:
            far = min(far, nodes - 1)
        seconds = size * (near / self._link(1) + far / self._link(ranks))
        return (4 + 2 * (self._passes("moe") - 3)) * seconds

    def _pipeline(
        self, packs: Sequence[Sequence[tuple[int, ...]]], mean: float, micro_batches: int
    ) -> float:
        """Waiting for the first micro-batch to arrive, and hidden states between stages."""
        pp, vpp = self.layout.pp, self.layout.vpp
        if pp == 1:
            return 0.0
        biggest = max(sum(pack) for rank in packs for pack in rank)
        sequence = biggest / self.layout.cp / self.layout.tp
        sent = sequence * self.model.hidden * self.activations.element
        ranks = self.layout.tp * self.layout.cp * self.layout.dp * 2
        return (pp - 1) * (mean / vpp + 2 * sent / self._link(ranks))

    def _data(self, state: StateBytes, mean: float) -> float:
        """Summing gradients and gathering weights over data-parallel ranks."""
        layout, parallel = self.layout, self.layout.parallel
        shards = layout.shards
        if shards == 1:
            return 0.0
        link = self._link(layout.tp * shards)
        share = (shards - 1) / shards
        reduce, gather = state.gradients * share / link, state.weights * share / link
        if parallel.overlap_grad_reduce:  # behind the last micro-batch's backward
            reduce = max(0.0, reduce - mean * 2 / 3)
        if parallel.overlap_param_gather:  # behind the first one's forward
            gather = max(0.0, gather - mean / 3)
        return reduce + gather

    def _optimizer(self, state: StateBytes) -> float:
        here = state.optimizer * _OPTIMIZER_PASSES / self._bandwidth
        return here + state.offloaded * _OPTIMIZER_PASSES / _HOST_BANDWIDTH
