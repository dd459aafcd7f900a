"""Which rank works on which sequences, in which packs. Pure: no communication, no torch.

Every rank has the whole mini-batch and computes the same plan, so ranks need not communicate.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, token_budget: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Packs sequences under a token budget: as many packs and nearly as much work on every rank.

    Longest first, each sequence goes to the pack with the least work that has room for it. Heaviest
    first, each pack goes to the rank with the least work that still lacks a pack. Then the rank
    with the most work exchanges sequences with the others until no exchange helps. Work grows with
    a sequence's length and, as attention does, with the square of its length.

    A sequence over the budget gets a pack of its own. A pack is empty only if there are fewer
    sequences than packs. All arithmetic is in integers, so every rank computes the same plan.

    Args:
        lengths: tokens of each sequence, at least 1.
        multiple_of: the number of packs per rank is a multiple of this (interleaved pipelining
            needs the pipeline size).

    Returns:
        plan[rank][pack] = indices of sequences; every index exactly once.
    """
    sizes = np.array(lengths, dtype=np.int64)
    ranks = data_parallel_size
    # No fewer packs will do: all tokens have to fit, and no two of the larger half share a pack.
    tokens = int(np.minimum(sizes, token_budget).sum())
    fewest = max(tokens / token_budget, int((2 * sizes > token_budget).sum()), 1)
    first = math.ceil(fewest / (ranks * multiple_of)) * multiple_of
    attempts = (_pack(sizes, ranks, n, token_budget) for n in itertools.count(first, multiple_of))
    packings = (packing for packing in attempts if packing is not None)
    best = next(packings)
    if best.unevenness > _TOLERANCE and ranks * best.per_rank < len(sizes):
        # Packs that are full leave no room for exchanges; a pack more per rank costs little.
        best = min(best, next(packings), key=lambda packing: packing.unevenness)
    plan: list[list[list[int]]] = [[[] for _ in range(best.per_rank)] for _ in range(ranks)]
    for i in _descending(sizes):
        rank, pack = divmod(best.pack_of[i], best.per_rank)
        plan[rank][pack].append(int(i))
    return plan


_TOLERANCE = 0.02
"""Another pack per rank is worth it where the heaviest rank has more work than the mean by more
than this fraction."""
_LINEAR = 8192
"""At this length, in tokens, the linear and the quadratic part of the work are equal."""
_NEVER = np.iinfo(np.int64).max


def _work(sizes: Integers) -> Integers:
    return sizes * (_LINEAR + sizes)


def _descending(values: Integers) -> Integers:
    return np.argsort(-values, kind="stable")


def _sums(values: Integers, places: Integers, size: int) -> Integers:
    """[size] the sum of the values at each place."""
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, places, values)
    return sums


@dataclass(frozen=True)
class _Packing:
    pack_of: Integers
    """[sequences] The packs of rank r are numbered from r * per_rank on."""
    per_rank: int
    unevenness: float
    """The heaviest rank's work over the mean, minus 1."""


def _pack(sizes: Integers, ranks: int, per_rank: int, token_budget: int) -> _Packing | None:
    """Packs the sequences into so many packs per rank; None if they do not fit."""
    filled = _fill_packs(sizes, ranks * per_rank, token_budget)
    if filled is None:
        return None
    dealt = _deal_packs(sizes, filled, ranks, per_rank)
    pack_of = _exchange_sequences(sizes, dealt, ranks, per_rank, token_budget)
    work = _sums(_work(sizes), pack_of // per_rank, ranks)
    return _Packing(pack_of, per_rank, ranks * int(work.max()) / max(int(work.sum()), 1) - 1)


def _fill_packs(sizes: Integers, packs: int, token_budget: int) -> Integers | None:
    """The pack of each sequence; None if they do not fit."""
    pack_of = np.empty_like(sizes)
    tokens, work = np.zeros((2, packs), dtype=np.int64)
    for i in _descending(sizes):
        room = (tokens == 0) | (tokens + sizes[i] <= token_budget)
        lightest = np.where(room, work, _NEVER).argmin()
        if not room[lightest]:
            return None
        pack_of[i] = lightest
        tokens[lightest] += sizes[i]
        work[lightest] += _work(sizes[i])
    return pack_of


def _deal_packs(sizes: Integers, pack_of: Integers, ranks: int, per_rank: int) -> Integers:
    """Renumbers the packs: those of rank r begin at r * per_rank."""
    pack_work = _sums(_work(sizes), pack_of, ranks * per_rank)
    number = np.empty_like(pack_work)
    count, work = np.zeros((2, ranks), dtype=np.int64)
    for pack in _descending(pack_work):
        lightest = np.where(count < per_rank, work, _NEVER).argmin()
        number[pack] = lightest * per_rank + count[lightest]
        count[lightest] += 1
        work[lightest] += pack_work[pack]
    return number[pack_of]


def _exchange_sequences(
    sizes: Integers, pack_of: Integers, ranks: int, per_rank: int, token_budget: int
) -> Integers:
    """The pack of each sequence once no exchange lightens the heaviest rank.

    Every exchange lowers the larger work of two ranks, so this ends.
    """
    packs = ranks * per_rank
    # Each pack also offers an empty place, a sequence of length 0.
    sizes = np.concatenate([sizes, np.zeros(packs, dtype=np.int64)])
    pack_of = np.concatenate([pack_of, np.arange(packs)])
    while True:
        rank_of = pack_of // per_rank
        tokens = _sums(sizes, pack_of, packs)
        heaviest, *others = _descending(_sums(_work(sizes), rank_of, ranks))
        mine = np.flatnonzero(rank_of == heaviest)
        for other in reversed(others):
            theirs = np.flatnonzero(rank_of == other)
            pair = _best_exchange(sizes, pack_of, tokens, mine, theirs, token_budget)
            if pair is not None:
                pack_of[pair] = pack_of[pair[::-1]]
                break
        else:
            return pack_of[:-packs]


def _best_exchange(
    sizes: Integers,
    pack_of: Integers,
    tokens: Integers,
    mine: Integers,
    theirs: Integers,
    token_budget: int,
) -> Integers | None:
    """The sequence of the heavier rank and that of the other whose exchange brings the two ranks'
    work closest together; None if none within the budget brings it closer.

    Args:
        tokens: [packs] tokens in each.
        mine, theirs: the sequences of the heavier rank and of the other.
    """
    work = _work(sizes)
    gap = work[mine].sum() - work[theirs].sum()
    passed = work[mine][:, None] - work[theirs]
    # What stays in the two packs. Mine gets a shorter sequence, so it keeps within the budget.
    my_rest = (tokens[pack_of[mine]] - sizes[mine])[:, None]
    their_rest = tokens[pack_of[theirs]] - sizes[theirs]
    allowed = (
        (passed > 0)
        & (passed < gap)
        & (my_rest + sizes[theirs] > 0)
        & ((their_rest == 0) | (their_rest + sizes[mine][:, None] <= token_budget))
    )
    best = np.where(allowed, abs(gap - 2 * passed), _NEVER).argmin()
    if not allowed.flat[best]:
        return None
    return np.array([mine[best // len(theirs)], theirs[best % len(theirs)]])
