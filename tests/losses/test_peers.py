"""Values that the tests of other trainers state for the same losses."""

import math

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import (
    GPPOConfig,
    Sequences,
    cispo,
    dppo,
    kl_to_reference,
    ppo_clip,
    reinforce,
    trained_tokens,
)


def with_ratios(ratios: list[float]) -> tuple[Tensor, Tensor]:
    """Log-probabilities, a leaf, and old ones."""
    old = torch.full((len(ratios),), -2.0)
    return (old + torch.tensor(ratios).log()).requires_grad_(), old


def test_slime_dual_clip():
    """tests/test_policy_loss.py of THUDM/slime."""
    advantages = torch.tensor([2.0, -2.0, 2.0])
    losses = ppo_clip(*with_ratios([2.0, 2.0, 0.5]), advantages, clip_high=0.2, dual_clip=1.5)
    torch.testing.assert_close(losses, torch.tensor([-2.4, 3.0, -1.0]))


@pytest.mark.parametrize(
    ("low", "high", "ratios", "clamped"),
    [
        (0.2, 0.28, [1.0, 1.14, 1.56, 0.4], [1.0, 1.14, 1.28, 0.8]),
        (1.0, 4.0, [1.0, 3.0, 9.0, 0.4], [1.0, 3.0, 5.0, 0.4]),
    ],
)
def test_slime_cispo(low, high, ratios, clamped):
    """tests/test_cispo_loss.py of THUDM/slime. Its value also has the log-probability as a factor;
    the gradient is the same."""
    log_probs, old = with_ratios(ratios)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0])
    cispo(log_probs, old, advantages, clip_low=low, clip_high=high).sum().backward()
    torch.testing.assert_close(log_probs.grad, -torch.tensor(clamped) * advantages)


def test_slime_kl():
    """tests/test_ppo_kl_metric.py of THUDM/slime, whose k1 is the difference."""
    ref_log_probs = torch.tensor([0.4, 0.5, 0.6])
    kl = kl_to_reference(torch.tensor([0.5, 0.7, 0.9]), ref_log_probs, "k1")
    torch.testing.assert_close(kl, torch.tensor([0.1, 0.2, 0.3]))


def test_verl_rejects_tokens_outside_a_band():
    """tests/trainer/ppo/test_rollout_corr.py of volcengine/verl."""
    fields = {
        "old_log_probs": torch.full((10,), -2.0),
        "rollout_log_probs": torch.tensor([-1.0] * 5 + [-2.5] * 5),
        "loss_mask": torch.ones(10),
    }
    config = GPPOConfig(token_mask=(0.5, 2.0))
    kept = trained_tokens(fields, Sequences.whole([5, 5]), config)
    assert kept.tolist() == [0] * 5 + [1] * 5


def test_rllm_icepop_dppo_and_reinforce():
    """The unit tests of losses of rllm-org/rllm."""
    fields = {
        "old_log_probs": torch.full((3,), -0.5),
        "rollout_log_probs": -0.5 - torch.tensor([0.3, 1.0, 10.0]).log(),
        "loss_mask": torch.ones(3),
    }
    config = GPPOConfig(token_mask=(0.5, 5.0))
    assert trained_tokens(fields, Sequences.whole([3]), config).tolist() == [0, 1, 0]

    log_probs = torch.tensor([0.90, 0.52]).log().requires_grad_()
    old = torch.full((2,), math.log(0.5))
    dppo(log_probs, old, torch.ones(2), bound_low=0.2, bound_high=0.2).sum().backward()
    assert log_probs.grad[0] == 0
    assert log_probs.grad[1] != 0

    value = reinforce(torch.tensor([-0.5, -0.6]), torch.tensor([2.0, -1.0])).sum()
    torch.testing.assert_close(value, torch.tensor(0.4))
