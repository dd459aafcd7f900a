"""Bytes of weights, gradients and optimizer state that a rank holds: exact, padding included.

As Megatron-Core's data parallelism (`param_and_grad_buffer.py`) and distributed optimizer do it,
weights and gradients are views of buffers. A buffer begins every parameter at a multiple of 64
elements, last parameter first, and ends every bucket at a multiple of 128 and of the ranks that
share it. Each of these ranks owns one equal part of every bucket, and the state of what lies there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from klear_megatron.planning.layout import Chunk, Layout, Place
from klear_megatron.planning.model import Parameter, PlannedModel

_GRADIENT = 4  # float32
_MOMENTS = 8  # exp_avg and exp_avg_sq in float32
_MASTER = 4  # float32 weights, where the model's are not


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    offloaded: int = 0
    """Of the optimizer's state, in the host's memory."""

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.offloaded + other.offloaded,
        )


@dataclass(frozen=True)
class Formats:
    """How a run keeps what it trains."""

    weight_bytes: int
    """Of one element: 4 in float32, 2 in bfloat16."""
    layer_matrix_bytes: int
    """Of one element of a layer's matrices: less than `weight_bytes` where they are kept in FP8."""
    step_bytes: int = 4
    """Of the step counter of each parameter's state; torch's Adam has one, fused ones do not."""
    offload: float = 0.0
    """Share of the optimizer's state on the host."""


def state_bytes(
    model: PlannedModel, layout: Layout, place: Place, formats: Formats, bucket: int | None
) -> StateBytes:
    """What the rank at `place` holds.

    Args:
        bucket: elements after which the first virtual stage's buffers begin another bucket, where
            communication is overlapped; None for one bucket.
    """
    total = StateBytes(0, 0, 0)
    for number, chunk in enumerate(layout.chunks(place.pipeline, model.layers)):
        mine = list(_my_parameters(model, layout, place, chunk))
        size = bucket if number == 0 and place.pipeline == 0 else None
        shares = (
            (False, place.data * layout.cp + place.context, layout.shards),
            (True, place.expert_data, layout.expert_shards),
        )
        for experts, index, ranks in shares:
            some = [p for p, apart, _ in mine if apart == experts]
            own_bucket = [alone for _, apart, alone in mine if apart == experts]
            total += _buffer(some, own_bucket, index, ranks, formats, size)
    return total


def roughly(model: PlannedModel, layout: Layout, stage: int, formats: Formats) -> StateBytes:
    """What every rank of a pipeline stage holds, without padding: fast, for searches. Its weights
    are exactly those of a model that is not trained, such as a reference."""
    dense = experts = matrices = 0
    for chunk in layout.chunks(stage, model.layers):
        sums = model.layer_sums[chunk.layers.start : chunk.layers.stop]
        cut = sum(of_one[0] for of_one in sums) // layout.tp
        apart = sum(of_one[2] for of_one in sums) // layout.ep // layout.etp
        embeddings = chunk.first + (chunk.last and not (model.tied and chunk.first))
        dense += cut + sum(of_one[1] for of_one in sums) + chunk.last * model.final_norm.numel
        dense += embeddings * model.embedding(layout.tp).numel // layout.tp
        experts, matrices = experts + apart, matrices + cut + apart
    per_element = _MOMENTS + (_MASTER if formats.weight_bytes < _MASTER else 0)
    optimizer = per_element * (dense // layout.shards + experts // layout.expert_shards)
    offloaded = round(optimizer * formats.offload)
    saved = matrices * (formats.weight_bytes - formats.layer_matrix_bytes)
    weights = (dense + experts) * formats.weight_bytes - saved
    gradients = (dense + experts) * _GRADIENT
    return StateBytes(weights, gradients, optimizer - offloaded, offloaded)


def default_bucket(shards: int) -> int:
    """Megatron-Core's own size of a bucket, in elements."""
    return max(40_000_000, 1_000_000 * shards)


def _my_parameters(
    model: PlannedModel, layout: Layout, place: Place, chunk: Chunk
) -> Iterator[tuple[Parameter, bool, bool]]:
    """(the rank's part of a parameter, whether it is reduced over experts' ranks, whether it gets
    a bucket of its own), in Megatron's order."""
    shared = model.tied and layout.pp > 1
    if chunk.first:
        yield _cut(model.embedding(layout.tp), layout.tp), False, shared
    for number in chunk.layers:
        for parameter in model.layer_parameters[number]:
            if parameter.expert is None:
                yield _cut(parameter, layout.tp), False, False
            elif parameter.expert // (model.num_experts // layout.ep) == place.expert:
                yield _cut(parameter, layout.etp), layout.ep > 1, False
    if chunk.last:
        yield model.final_norm, False, False
        if not (model.tied and chunk.first):
            yield _cut(model.embedding(layout.tp), layout.tp), False, shared


def _cut(parameter: Parameter, ranks: int) -> Parameter:
    if not parameter.cut or ranks == 1:
        return parameter
    return Parameter(
        parameter.numel // ranks,
        cut=True,
        expert=parameter.expert,
        layer=parameter.layer,
        matrix=parameter.matrix,
    )


def _buffer(
    parameters: list[Parameter],
    own_bucket: list[bool],
    index: int,
    ranks: int,
    formats: Formats,
    bucket_size: int | None,
) -> StateBytes:
    """One buffer, and the state of part `index` of it."""
    numel = optimizer = saved = 0
    bucket: list[tuple[int, int]] = []  # where its parameters begin and end
    start = 0
    multiple = math.lcm(ranks, 128)

    def close(end: int) -> None:
        nonlocal numel, optimizer, bucket, start
        end = _round_up(end, multiple)
        share = (end - numel) // ranks
        low, high = numel + index * share, numel + (index + 1) * share
        for begin, stop in bucket:
            owned = min(stop, high) - max(begin, low)
            if owned > 0:
                per_element = _MOMENTS + (_MASTER if formats.weight_bytes < _MASTER else 0)
                optimizer += owned * per_element + formats.step_bytes
        numel, start, bucket = end, end, []

    for parameter, alone in zip(reversed(parameters), reversed(own_bucket), strict=True):
        start = _round_up(start, 64)
        if alone and bucket:
            close(start)
        bucket.append((start, start + parameter.numel))
        start += parameter.numel
        if parameter.layer and parameter.matrix:
            saved += parameter.numel * (formats.weight_bytes - formats.layer_matrix_bytes)
        if alone or (bucket_size is not None and start - numel >= bucket_size):
            close(start)
    if bucket:
        close(start)
    offloaded = round(optimizer * formats.offload)
    return StateBytes(
        numel * formats.weight_bytes - saved,
        numel * _GRADIENT,
        optimizer - offloaded,
        offloaded,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
