"""Every tensor has one place, and no rank waits for one that waits for it."""

import itertools
import random

import torch

from klear_megatron.platform.tensors import PlacedTensor
from klear_megatron.rollout.weight_buckets import Place, cut

DTYPES = [torch.bfloat16, torch.float32, torch.uint8]


def tensors(ranks: int, count: int = 200) -> list[PlacedTensor]:
    draw = random.Random(ranks)
    return [
        PlacedTensor(str(i), draw.choice(DTYPES), (draw.randint(1, 9), 7), draw.randrange(ranks))
        for i in range(count)
    ]


def test_tensors_share_a_bucket_up_to_its_size_and_can_be_read_back():
    given = tensors(1)
    buckets = cut(given, 500)
    places = [place for bucket in buckets for place in bucket.places]
    assert [(p.name, p.dtype, p.shape) for p in places] == [
        (t.name, t.dtype, t.shape) for t in given
    ]
    assert all(bucket.size <= 500 for bucket in buckets)
    # The first tensor of a bucket would not have fitted into the one before.
    for before, after in itertools.pairwise(buckets):
        assert before.size + after.places[0].size + 15 > 500
    for bucket in buckets:
        data = torch.zeros(bucket.size, dtype=torch.uint8)
        written = [torch.rand(place.shape).mul(99).to(place.dtype) for place in bucket.places]
        for place, value in zip(bucket.places, written, strict=True):
            place.of(data).copy_(value)
        for place, value in zip(bucket.places, written, strict=True):
            assert torch.equal(place.of(data), value)


def test_a_tensor_larger_than_a_bucket_has_one_of_its_own():
    large = PlacedTensor("large", torch.float32, (1000,), 0)
    small = [PlacedTensor(name, torch.float32, (2,), 0) for name in "ab"]
    buckets = cut([small[0], large, small[1]], 64)
    assert [bucket.places for bucket in buckets] == [
        [Place("a", torch.float32, (2,), 0, 8)],
        [Place("large", torch.float32, (1000,), 0, 4000)],
        [Place("b", torch.float32, (2,), 0, 8)],
    ]


def test_buckets_end_in_the_order_of_the_tensors_whoever_sends_them():
    buckets = cut(tensors(3), 500)
    assert {bucket.rank for bucket in buckets} == {0, 1, 2}
    last = [int(bucket.places[-1].name) for bucket in buckets]
    assert last == sorted(last)
    assert sorted(int(p.name) for b in buckets for p in b.places) == list(range(200))
    for rank in range(3):
        mine = [int(p.name) for b in buckets if b.rank == rank for p in b.places]
        assert mine == sorted(mine)
