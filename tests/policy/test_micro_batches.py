import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_megatron.policy.batch import Batch
from klear_megatron.policy.micro_batches import build_micro_batch
from klear_megatron.policy.packing import plan_micro_batches

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 400), st.integers(1, 3))
def test_a_plan_has_every_sequence_once_and_no_pack_over_budget(lengths, ranks, budget, multiple):
    plan = plan_micro_batches(lengths, ranks, budget, multiple)
    assert sorted(i for rank in plan for pack in rank for i in pack) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(packs) for packs in plan}) == 1
    assert len(plan[0]) % multiple == 0
    assert len(plan[0]) < math.ceil(len(lengths) / ranks) + multiple  # never more than one each
    packs = [pack for rank in plan for pack in rank]
    assert all(packs) or len(lengths) < len(packs)
    for pack in packs:
        assert len(pack) <= 1 or sum(lengths[i] for i in pack) <= budget


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=8, max_size=40), st.integers(300, 2000))
def test_ranks_have_about_the_same_number_of_tokens(lengths, budget):
    plan = plan_micro_batches(lengths, 2, budget)
    first, second = (sum(lengths[i] for pack in rank for i in pack) for rank in plan)
    assert abs(first - second) <= 2 * max(lengths)


@pytest.mark.parametrize(("sequences", "bound"), [(128, 1.03), (64, 1.08)])
@pytest.mark.parametrize(
    ("median", "sigma"),
    [(4000, 1.0), (6000, 0.8), (8000, 0.8), (8000, 1.0), (12000, 0.6), (16000, 0.8)],
)
def test_the_heaviest_rank_has_little_more_work_than_the_mean(sequences, bound, median, sigma):
    def work(length: int) -> float:
        return length + length**2 / 8192

    for seed in range(30):
        # Log-normal lengths, cut at the recipe's context of 32K.
        drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, sequences)
        lengths = [int(n) for n in drawn.clip(1, 32768)]
        plan = plan_micro_batches(lengths, 8, 32768)
        ranks = [sum(work(lengths[i]) for pack in rank for i in pack) for rank in plan]
        # Where one sequence has more work than the mean, its rank has as much at least.
        least = max(sum(ranks) / 8, work(max(lengths)))
        assert max(ranks) <= bound * least, f"seed {seed}: {max(ranks) / least}"
        tokens = [sum(lengths[i] for i in pack) for rank in plan for pack in rank]
        assert max(tokens) <= 32768


def test_the_same_plan_everywhere_and_a_long_sequence_alone():
    plan = plan_micro_batches([10, 1000, 10, 10, 10], 2, 50)
    assert plan == plan_micro_batches([10, 1000, 10, 10, 10], 2, 50)
    assert [1] in [pack for rank in plan for pack in rank]


@settings(deadline=None)
@given(lengths, st.integers(1, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_packs_of_all_context_parallel_ranks_hold_every_token_once(lengths, tp, cp, random):
    batch = Batch.from_sequences([[random.randrange(1000) for _ in range(n)] for n in lengths])
    align = tp * (2 * cp if cp > 1 else 1)
    ranks = [
        build_micro_batch(batch, range(len(lengths)), align=align, cp_rank=r, cp_size=cp)
        for r in range(cp)
    ]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    predicted = torch.cat([micro.targets[micro.targets >= 0] for micro in ranks])
    everything_but_first = [
        t for s, n in zip(starts.tolist(), lengths, strict=False) for t in range(s + 1, s + n)
    ]
    assert sorted(predicted.tolist()) == everything_but_first
    assert sum(int((~micro.padding).sum()) for micro in ranks) == sum(lengths)
    for micro in ranks:
        rows = micro.targets >= 0
        assert not (rows & micro.padding).any()
        # A position predicts the next token of its own sequence, from its own place in it.
        assert torch.equal(micro.labels[rows], batch.tokens[micro.targets[rows]])
        assert torch.equal(micro.tokens[rows], batch.tokens[micro.targets[rows] - 1])
        sequence = torch.bucketize(micro.targets[rows], starts, right=True) - 1
        assert torch.equal(micro.position_ids[rows], micro.targets[rows] - 1 - starts[sequence])
        assert torch.equal(micro.sequences[rows], sequence)
        assert len(micro.sequences) == len(micro.tokens)
        assert len(micro.tokens) * cp == micro.cu_seqlens[-1]
        assert len(micro.tokens) % tp == 0


def test_zig_zag_gives_each_rank_an_early_and_a_late_chunk():
    batch = Batch.from_sequences([list(range(100, 108)), list(range(200, 206))])
    first, second = (
        build_micro_batch(batch, [1, 0], align=4, cp_rank=rank, cp_size=2) for rank in (0, 1)
    )
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 16]
    assert first.max_seqlen == 8
    assert first.tokens.tolist() == [200, 201, 0, 0, 100, 101, 106, 107]
    assert second.tokens.tolist() == [202, 203, 204, 205, 102, 103, 104, 105]
    assert first.targets.tolist() == [9, 10, -1, -1, 1, 2, 7, -1]
    assert first.sequences.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_an_empty_pack_is_padding_without_targets():
    batch = Batch.from_sequences([[1, 2, 3]])
    micro = build_micro_batch(batch, [], align=4)
    assert micro.tokens.tolist() == [0] * 4
    assert (micro.targets == -1).all()
