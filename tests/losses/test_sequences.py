"""Sums and means over sequences, against a loop over them."""

import torch

from klear_megatron.losses import Sequences

LENGTHS = [5, 1, 8, 3]
STARTS = [0, 5, 6, 14]
TOKENS = sum(LENGTHS)


def random(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_sequence(values: torch.Tensor) -> list[torch.Tensor]:
    return [values[a : a + n] for a, n in zip(STARTS, LENGTHS, strict=True)]


def test_sums_and_masked_means():
    values, mask = random(0), (random(1) > 0).double()
    mask[:5] = 0  # a sequence of which nothing is trained
    sequences = Sequences.whole(LENGTHS)
    expected = torch.stack([part.sum() for part in by_sequence(values)])
    torch.testing.assert_close(sequences.sums(values), expected, rtol=1e-12, atol=1e-12)
    pairs = zip(by_sequence(values), by_sequence(mask), strict=True)
    means = torch.stack([v[m > 0].mean() if m.any() else v.new_zeros(()) for v, m in pairs])
    torch.testing.assert_close(sequences.means(values, mask), means, rtol=1e-12, atol=1e-12)
    assert sequences.spread(torch.arange(4.0)).tolist() == [0.0] * 5 + [1.0] + [2.0] * 8 + [3.0] * 3


def test_gradients_flow_through_sums_and_means():
    values, mask = random(0).requires_grad_(), (random(1) > 0).double()
    sequences = Sequences.whole(LENGTHS)

    def through(values: torch.Tensor) -> torch.Tensor:
        means = sequences.means(values, mask)
        return sequences.spread(means).exp() * values + sequences.sums(values**2).sum()

    assert torch.autograd.gradcheck(through, (values,))


def test_tokens_in_any_order_and_a_rank_without_tokens_of_a_sequence():
    values, order = random(0), torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    whole = Sequences.whole(LENGTHS)
    shuffled = Sequences(whole.ids[order], whole.count)
    torch.testing.assert_close(shuffled.sums(values[order]), whole.sums(values))
    nothing = Sequences(whole.ids[:0], whole.count)
    assert nothing.sums(values[:0]).tolist() == [0.0] * 4
    assert nothing.spread(torch.ones(4)).shape == (0,)
