import pytest
import torch

from klear_megatron.losses import group_advantages


def test_is_reward_minus_mean_over_std_within_each_group():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    groups = torch.arange(4)[:, None].expand(4, 6)
    shuffled = torch.randperm(24, generator=generator)
    actual = group_advantages(rewards.flatten()[shuffled], groups.flatten()[shuffled])
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    torch.testing.assert_close(actual, expected.flatten()[shuffled], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rewards", [[0.1], [0.1] * 7, [-1.0] * 8, [1e-30, 1e-30], []], ids=lambda r: str(len(r))
)
def test_groups_that_say_nothing_have_advantage_zero(rewards):
    # The mean of seven times 0.1 is not 0.1, so a plain formula gives +-1 or NaN here.
    actual = group_advantages(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64))
    assert actual.tolist() == [0.0] * len(rewards)


def test_groups_of_different_sizes_do_not_mix():
    rewards = torch.tensor([1.0, -1.0, 5.0, 1.0, 1.0])
    actual = group_advantages(rewards, torch.tensor([0, 0, 1, 2, 2]))
    torch.testing.assert_close(actual, torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0, 0]))
