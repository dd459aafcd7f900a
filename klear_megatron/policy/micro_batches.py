"""Which rank works on which sequences, and in which packs. Pure: no communication, no Megatron.

Every rank has the whole mini-batch and computes the same plan, so no rank has to ask another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klear_megatron.policy.batch import Batch


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, token_budget: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Packs sequences under a token budget, the same number of packs on every rank.

    Longest first, each sequence goes to the pack with the least work that still has room. Work is
    quadratic in a sequence's length, as attention is, plus a linear term. A sequence over the
    budget gets a pack of its own. A pack stays empty only if there are fewer sequences than packs.

    Args:
        lengths: tokens of each sequence.
        multiple_of: the number of packs per rank is a multiple of this (interleaved pipelining
            needs the pipeline size).

    Returns:
        plan[rank][pack] = indices of sequences; every index exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # No fewer packs will do: all tokens have to fit, and no two of the larger half share a pack.
    tokens = sum(min(length, token_budget) for length in lengths)
    fewest = max(tokens / token_budget, sum(2 * n > token_budget for n in lengths), 1)
    per_rank = math.ceil(fewest / (data_parallel_size * multiple_of)) * multiple_of
    while (packs := _pack(order, lengths, data_parallel_size * per_rank, token_budget)) is None:
        per_rank += multiple_of
    # Deal the packs out by work, back and forth, so that no rank gets all the heavy ones.
    packs.sort(key=lambda pack: -sum(_work(lengths[i]) for i in pack))
    plan: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for number, pack in enumerate(packs):
        lap, place = divmod(number, data_parallel_size)
        plan[place if lap % 2 == 0 else -1 - place].append(pack)
    return plan


def _work(length: int) -> float:
    return length + length**2 / 8192


def _pack(
    order: list[int], lengths: Sequence[int], packs: int, token_budget: int
) -> list[list[int]] | None:
    contents: list[list[int]] = [[] for _ in range(packs)]
    tokens, work = [0] * packs, [0.0] * packs
    for i in order:
        fits = [
            p for p in range(packs) if not contents[p] or tokens[p] + lengths[i] <= token_budget
        ]
        if not fits:
            return None
        lightest = min(fits, key=lambda p: work[p])
        contents[lightest].append(i)
        tokens[lightest] += lengths[i]
        work[lightest] += _work(lengths[i])
    return contents


@dataclass(frozen=True)
class MicroBatch:
    """One pack as one context-parallel rank sees it: T of its tokens, padding included."""

    tokens: Tensor
    """[T] int64 input ids."""
    position_ids: Tensor
    """[T] int64, starting again at 0 with every sequence."""
    labels: Tensor
    """[T] int64, the next token of the same sequence; 0 where there is none."""
    targets: Tensor
    """[T] int64, where in the batch's flat row the label stands; -1 where there is none."""
    padding: Tensor
    """[T] bool, true where there is no token of the batch."""
    cu_seqlens: Tensor
    """[sequences + 1] int32, over all context-parallel ranks, padding included."""
    max_seqlen: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


def build_micro_batch(
    batch: Batch, sequences: Sequence[int], *, align: int, cp_rank: int = 0, cp_size: int = 1
) -> MicroBatch:
    """Packs the given sequences, each padded at its end to a multiple of `align`.

    Padding comes after a sequence's tokens, so under causal attention it changes none of them, and
    no label points into it. An empty list gives a pack of padding alone: work without effect.
    With context parallelism the rank gets chunks `cp_rank` and `2 * cp_size - 1 - cp_rank` of the
    `2 * cp_size` chunks of each sequence; `align` must be a multiple of `2 * cp_size`.
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
        return torch.where(index >= 0, batch.tokens[index], 0)

    source, target = mine(sources), mine(targets)
    return MicroBatch(
        tokens=tokens_at(source),
        position_ids=mine(positions),
        labels=tokens_at(target),
        targets=target,
        padding=source < 0,
        cu_seqlens=torch.tensor([0, *padded]).cumsum(0).to(torch.int32),
        max_seqlen=max(padded),
    )
