"""Bytes that each rank needs, by kind."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from klear_megatron.planning import schedule
from klear_megatron.planning.activations import Activations
from klear_megatron.planning.layout import Layout, Place
from klear_megatron.planning.model import PlannedModel
from klear_megatron.planning.state import StateBytes
from klear_megatron.planning.work import Work


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What autograd saves, log-probabilities and loss apart, and what is computed again."""
    log_probs: int
    """What the output layer and the loss save, and a chunk's logits."""
    communication: int
    """Tokens on their way between tensor-, context-, expert- and pipeline-parallel ranks."""
    overhead: int
    """The hardware's constant, and the gradients of one layer's activations."""
    reference: int = 0
    """Weights of the model that a KL penalty compares with."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def saved_bytes(
    activations: Activations,
    layout: Layout,
    place: Place,
    packs: Sequence[tuple[int, ...]],
    layers: int,
) -> tuple[int, int]:
    """(the most bytes that autograd has saved at a time, those of log-probabilities in them).

    Args:
        packs: the padded lengths of each micro-batch.
    """
    chunks = layout.chunks(place.pipeline, layers)
    # Micro-batches of one size reach the most within a few rounds through the pipeline.
    enough = 3 * layout.pp if len(set(packs)) == 1 else len(packs)
    sizes = [Work(lengths) for lengths in packs[:enough]]

    known: dict[tuple[int, Work], tuple[int, int]] = {}

    def of_task(task: schedule.Task) -> tuple[int, int]:
        micro, chunk = task
        key = chunk, sizes[micro]
        if key not in known:
            known[key] = activations.chunk(chunks[chunk], sizes[micro], place.tensor)
        return known[key]

    order = schedule.tasks(len(sizes), layout.pp, layout.vpp, place.pipeline)
    most = schedule.peak(order, of_task)
    last = any(chunk.last for chunk in chunks)
    top = max(activations.log_probs(work, place.tensor) for work in set(sizes)) if last else 0
    return most, min(top, most)


def rank_memory(
    model: PlannedModel,
    layout: Layout,
    place: Place,
    state: StateBytes,
    activations: Activations,
    packs: Sequence[tuple[int, ...]],
    overhead: float,
) -> Memory:
    """Bytes of the rank at `place`, by kind."""
    most, top = saved_bytes(activations, layout, place, packs, model.layers)
    biggest = Work(max(packs, key=lambda lengths: sum(lengths)))
    last = place.pipeline == layout.pp - 1
    buffers = activations.log_prob_buffers(biggest) if last else 0
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=most - top,
        log_probs=top + buffers,
        communication=_communication(model, layout, activations.element, biggest),
        overhead=round(overhead) + activations.layer(biggest).kept // 2,
    )


def _communication(model: PlannedModel, layout: Layout, element: int, work: Work) -> int:
    tokens = work.tokens // layout.cp
    hidden = tokens * model.hidden * element
    gathered = hidden if layout.tp > 1 else 0
    keys = 2 * tokens * model.groups // layout.tp * model.head_dim * element
    passed_on = 4 * keys if layout.cp > 1 else 0  # two blocks, and their gradients
    sent = 2 * hidden // layout.tp if layout.pp > 1 else 0
    received = tokens // layout.tp * layout.etp * model.experts_per_token * model.hidden * element
    exchanged = 2 * received if layout.ep > 1 or layout.etp > 1 else 0
    return gathered + passed_on + sent + (exchanged if model.num_experts else 0)
