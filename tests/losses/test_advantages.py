import pytest
import torch

from klear_megatron.errors import UserError
from klear_megatron.losses import AdvantageConfig, advantages_of, group_advantages, whitened


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
    groups = torch.zeros(len(rewards), dtype=torch.int64)
    for estimator in ("grpo", "grpo_without_std", "rloo", "reinforce_plus_plus_baseline", "gdpo"):
        actual = group_advantages(torch.tensor(rewards), groups, estimator)
        assert actual.tolist() == [0.0] * len(rewards)


def test_groups_of_different_sizes_do_not_mix():
    rewards = torch.tensor([1.0, -1.0, 5.0, 1.0, 1.0])
    actual = group_advantages(rewards, torch.tensor([0, 0, 1, 2, 2]))
    torch.testing.assert_close(actual, torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0, 0]))


REWARDS = [1.0, -1.0, 0.25, 0.25, 3.0]


def test_estimators_are_their_definitions():
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    others = torch.stack([torch.cat([rewards[:i], rewards[i + 1 :]]).mean() for i in range(5)])
    centred = rewards - rewards.mean()
    for estimator, expected in (
        ("grpo", centred / rewards.std()),
        ("grpo_without_std", centred),
        ("rloo", rewards - others),
        ("reinforce_plus_plus", rewards),
        ("reinforce_plus_plus_baseline", centred),
    ):
        config = AdvantageConfig(estimator=estimator)
        actual = torch.tensor(advantages_of(REWARDS, [{}] * 5, config), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, msg=estimator)
        assert config.whitened == estimator.startswith("reinforce")


def test_gdpo_compares_each_part_by_itself():
    parts = [{"right": 1.0, "short": 0.1}, {"right": 0.0, "short": 0.9}, {"right": 1, "short": 0.5}]
    config = AdvantageConfig(estimator="gdpo", part_weights={"right": 1.0, "short": 0.5})
    right = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    short = torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    expected = (right - right.mean()) / right.std() + 0.5 * (short - short.mean()) / short.std()
    actual = torch.tensor(advantages_of([9.0, 9.0, 9.0], parts, config), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert config.whitened


def test_gdpo_tells_apart_rewards_whose_sums_are_equal_and_grpo_does_not():
    parts = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}]
    config = AdvantageConfig(estimator="gdpo", part_weights={"a": 2.0, "b": 1.0})
    of_parts = advantages_of([1.0] * 3, parts, config)
    assert of_parts[0] > 0 > of_parts[1] == of_parts[2]
    assert advantages_of([1.0] * 3, parts, AdvantageConfig()) == [0.0] * 3


def test_a_part_that_is_not_there_is_named():
    config = AdvantageConfig(estimator="gdpo", part_weights={"length": 1.0})
    with pytest.raises(UserError, match=r"part_weights: .* no part 'length'; it has: a, b"):
        advantages_of([1.0], [{"b": 1.0, "a": 2.0}], config)
    for wrong in ({"estimator": "gdpo"}, {"part_weights": {"a": 1.0}}):
        with pytest.raises(ValueError, match="gdpo and part_weights need each other"):
            AdvantageConfig(**wrong)


def test_whitening_is_over_the_responses_that_are_trained():
    advantages = torch.tensor([1.0, 50.0, -2.0, 4.0], dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    values = advantages[mask > 0]
    expected = (advantages - 1) / values.std()
    torch.testing.assert_close(whitened(advantages, mask), expected, rtol=1e-12, atol=1e-12)
    assert whitened(torch.full((7,), 0.1), torch.ones(7)).tolist() == [0.0] * 7
    assert whitened(advantages, mask * 0).tolist() == [0.0] * 4
    assert whitened(advantages[:0], mask[:0]).tolist() == []
