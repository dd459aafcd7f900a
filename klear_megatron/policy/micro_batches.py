"""A pack of sequences as one context-parallel rank computes with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klear_megatron.policy.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """One pack as one context-parallel rank sees it: T of its tokens, padding included."""

    tokens: Tensor
    """[T] int64 input ids."""
    position_ids: Tensor
    """[T] int64, from 0 in every sequence."""
    labels: Tensor
    """[T] int64, the next token of the same sequence; 0 if there is none."""
    targets: Tensor
    """[T] int64, the label's index in the batch's flat row; -1 if there is none."""
    sequences: Tensor
    """[T] int64, which of the pack's sequences the token, or padding after it, belongs to."""
    padding: Tensor
    """[T] bool, true for padding."""
    cu_seqlens: Tensor
    """[sequences + 1] int32, where sequences begin and end on all context-parallel ranks together,
    padding included."""
    max_seqlen: int

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


def build_micro_batch(
    batch: Batch, sequences: Sequence[int], *, align: int, cp_rank: int = 0, cp_size: int = 1
) -> MicroBatch:
    """Packs the given sequences, each padded at its end to a multiple of `align`.

    Padding follows a sequence's tokens, so under causal attention it affects none of them, and no
    label points into it. An empty list gives a pack of padding only, which contributes nothing.
    With context parallelism, each sequence is cut into `2 * cp_size` chunks, and the rank gets
    chunks `cp_rank` and `2 * cp_size - 1 - cp_rank`; `align` must be a multiple of `2 * cp_size`.
    """
    starts = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()
    sources, targets, positions, padded = [], [], [], []
    for i in sequences:
        length, start = batch.lengths[i], starts[i]
        total = math.ceil(length / align) * align
        here = torch.arange(total)
        sources.append(torch.where(here < length, start + here, -1))
        targets.append(torch.where(here < length - 1, start + here + 1, -1))
        positions.append(here)
        padded.append(total)
    if not padded:
        nothing = torch.full((align,), -1)
        sources, targets, positions, padded = [nothing], [nothing], [torch.arange(align)], [align]

    def mine(rows: list[Tensor]) -> Tensor:
        if cp_size == 1:
            return torch.cat(rows)
        chunks = [row.chunk(2 * cp_size) for row in rows]
        return torch.cat([c[k] for c in chunks for k in (cp_rank, 2 * cp_size - 1 - cp_rank)])

    def tokens_at(index: Tensor) -> Tensor:
        return torch.where(index >= 0, batch.tokens[index], 0).long()

    source, target = mine(sources), mine(targets)
    numbers = [torch.full((total,), number) for number, total in enumerate(padded)]
    return MicroBatch(
        tokens=tokens_at(source),
        position_ids=mine(positions),
        labels=tokens_at(target),
        targets=target,
        sequences=mine(numbers),
        padding=source < 0,
        cu_seqlens=torch.tensor([0, *padded]).cumsum(0).to(torch.int32),
        max_seqlen=max(padded),
    )
