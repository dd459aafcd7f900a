from itertools import pairwise

import pytest

from klear_megatron.data import PromptSampler
from klear_megatron.errors import UserError


def test_every_epoch_is_another_shuffle_of_all_rows():
    sampler = PromptSampler(num_rows=50, seed=3)
    epochs = [sampler.next_batch(50) for _ in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert all(one != next_one for one, next_one in pairwise([list(range(50)), *epochs]))


def test_seed_alone_fixes_the_order_and_batch_sizes_do_not_matter():
    one, other = PromptSampler(7, seed=3), PromptSampler(7, seed=3)
    assert one.next_batch(30) == [
        row for size in (1, 9, 0, 16, 4) for row in other.next_batch(size)
    ]
    assert PromptSampler(7, seed=4).next_batch(30) != PromptSampler(7, seed=3).next_batch(30)


@pytest.mark.parametrize("consumed", [0, 1, 6, 7, 8, 20, 21])
def test_resumes_at_the_exact_row(consumed):
    uninterrupted = PromptSampler(7, seed=3)
    uninterrupted.next_batch(consumed)
    state = uninterrupted.state_dict()
    resumed = PromptSampler(7, seed=3)
    resumed.next_batch(5)
    resumed.load_state_dict(state)
    assert resumed.next_batch(25) == uninterrupted.next_batch(25)


@pytest.mark.parametrize(("num_rows", "seed", "what"), [(8, 3, "num_rows"), (7, 4, "seed")])
def test_state_of_other_data_is_refused(num_rows, seed, what):
    with pytest.raises(UserError, match=what):
        PromptSampler(num_rows, seed).load_state_dict(PromptSampler(7, seed=3).state_dict())
