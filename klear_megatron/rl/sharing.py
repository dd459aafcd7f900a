"""Gives every rank the sequences that the leaders have made."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.platform import tensors
from klear_megatron.policy.batch import Batch


def share(mine: Batch, leaders: Sequence[int], limit: int) -> tuple[Batch, slice]:
    """Collective. The first `limit` sequences of the leaders' batches, in the leaders' order.

    Lengths and values per response travel first. Each rank then allocates the shared batch once,
    and receives the tokens and the values per token in place.

    Args:
        mine: this rank's sequences, none if it does not lead; with the same fields on all ranks.
        leaders: the ranks that have sequences.

    Returns:
        the shared batch, and where in it this rank's sequences are.
    """
    rank = dist.get_rank()
    counts = torch.tensor([len(mine.lengths) if rank == leader else 0 for leader in leaders])
    tensors.add_up(counts)
    ends = counts.cumsum(0).clamp(max=limit).tolist()
    rows = {
        leader: slice(*bounds)
        for leader, bounds in zip(leaders, itertools.pairwise([0, *ends]), strict=True)
    }
    own = rows.get(rank, slice(0, 0))
    table = _share_table(mine, own, ends[-1])
    lengths, prompt_lengths, *per_response = table.T

    starts = [0, *lengths.cumsum(0).tolist()]
    shared = {}
    pieces = []
    for name, values in {"tokens": mine.tokens, **mine.per_token}.items():
        shared[name] = torch.empty(starts[-1], dtype=values.dtype)
        for leader, one in rows.items():
            piece = shared[name][starts[one.start] : starts[one.stop]]
            if rank == leader:
                piece.copy_(values[: len(piece)])
            pieces.append((piece, leader))
    tensors.broadcast(pieces)
    batch = Batch(
        shared.pop("tokens"),
        lengths.tolist(),
        shared,
        {
            name: column.to(torch.int32).view(torch.float32)
            for name, column in zip(mine.per_response, per_response, strict=True)
        },
        prompt_lengths.tolist(),
    )
    return batch, own


def _share_table(mine: Batch, rows: slice, size: int) -> Tensor:
    """Collective. [size, columns] int64: the lengths of every sequence, its prompt's, and the bits
    of its values, which a sum with zeros leaves as they are.

    Args:
        rows: the place of this rank's sequences.
    """
    table = torch.zeros(size, 2 + len(mine.per_response), dtype=torch.int64)
    columns = [torch.tensor(values) for values in (mine.lengths, mine.prompt_lengths)]
    columns += [values.view(torch.int32) for values in mine.per_response.values()]
    for place, column in enumerate(columns):
        table[rows, place] = column[: rows.stop - rows.start].long()
    tensors.add_up(table)
    return table
