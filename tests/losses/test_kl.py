"""Estimates of the KL divergence from a reference, and the penalty in the loss, in float64."""

import pytest
import torch

from klear_megatron.errors import UserError
from klear_megatron.losses import GPPOConfig, KLConfig, PolicyObjective, kl_to_reference
from tests.losses.mini_batch import LENGTHS, make_fields, whole

ESTIMATORS = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: (-log_ratio).exp() - 1 + log_ratio,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_derivative_are_the_definitions(estimator):
    log_probs, _, fields = make_fields()
    reference = fields["old_log_probs"]
    pair = (
        kl_to_reference(log_probs, reference, estimator),
        ESTIMATORS[estimator](log_probs - reference),
    )
    torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(one.sum(), log_probs)[0] for one in pair]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_however_far_apart_the_policies_are(estimator, dtype):
    log_probs = torch.tensor([-1e4, -90.0, -1.0, 0.0], dtype=dtype, requires_grad=True)
    kl = kl_to_reference(log_probs, log_probs.detach().flip(0), estimator)
    (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
    assert kl.dtype == torch.float32
    assert kl.isfinite().all()
    assert gradient.isfinite().all()


def test_expected_value_is_the_divergence():
    """Of k1 and k3, over all tokens that a policy may draw; k2 is biased."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2)
    )
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        expected = (policy.exp() * kl_to_reference(policy, reference, estimator)).sum()
        torch.testing.assert_close(expected, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_penalty_is_aggregated_like_the_loss(aggregation):
    log_probs, entropy, fields = make_fields()
    fields["ref_log_probs"] = log_probs.detach() + 0.3 * fields["advantages"]
    plain = whole(PolicyObjective(GPPOConfig(aggregation=aggregation)), log_probs, entropy, fields)
    config = GPPOConfig(aggregation=aggregation, kl=KLConfig(coeff=0.2))
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    k3 = ESTIMATORS["k3"](log_probs - fields["ref_log_probs"])
    parts = zip(k3.split(LENGTHS), (fields["loss_mask"] > 0).split(LENGTHS), strict=True)
    rows = [part[mask] for part, mask in parts if mask.any()]
    by_token = aggregation == "token_mean"
    mean = torch.cat(rows).mean() if by_token else torch.stack([r.mean() for r in rows]).mean()
    expected = plain.loss + 0.2 * mean
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, log_probs)[0] for one in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        result.sums["kl_to_reference"], torch.cat(rows).mean().detach(), rtol=1e-12, atol=0
    )


def test_a_penalty_in_the_loss_needs_the_references_log_probs():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(GPPOConfig(kl=KLConfig(coeff=0.1)))
    with pytest.raises(UserError, match=r"loss\.kl: the batch has no ref_log_probs"):
        whole(objective, log_probs, entropy, fields)
    in_reward = PolicyObjective(GPPOConfig(kl=KLConfig(coeff=0.1, within="reward")))
    plain = PolicyObjective(GPPOConfig())
    results = [whole(one, log_probs, entropy, fields).loss for one in (in_reward, plain)]
    assert torch.equal(*results)
