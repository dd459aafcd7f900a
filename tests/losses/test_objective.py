import math
from itertools import pairwise

import pytest
import torch

from klear_megatron.losses import (
    CISPOConfig,
    GPPOConfig,
    PolicyObjective,
    PPOClipConfig,
    Sequences,
    SFTObjective,
    gppo,
)
from tests.losses.mini_batch import LENGTHS, SEQUENCES, TOKENS, make_fields, whole


def test_policy_objective_is_eq_7_plus_alpha_times_eq_14():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(GPPOConfig(sft_alpha=0.1))
    result = whole(objective, log_probs, entropy, fields)
    (gradient,) = torch.autograd.grad(result.loss, log_probs, retain_graph=True)

    mask, correct = fields["loss_mask"], fields["loss_mask"] * fields["correct"]
    per_token = gppo(log_probs, fields["old_log_probs"], fields["advantages"])
    expected = (per_token * mask).sum() / mask.sum() - 0.1 * (
        (log_probs * correct).sum() / correct.sum()
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


def test_truncated_importance_sampling_weighs_the_policy_loss_and_nothing_else():
    log_probs, entropy, fields = make_fields()
    # As if the server had given this token no chance, and this one was no part of the response.
    fields["rollout_log_probs"][0] -= 200
    fields["loss_mask"][:2] = torch.tensor([1.0, 0.0])
    fields["rollout_log_probs"][1] -= 1e4
    objective = PolicyObjective(GPPOConfig(sft_alpha=0.1, tis_clip=1.3))
    result = whole(objective, log_probs, entropy, fields)
    (gradient,) = torch.autograd.grad(result.loss, log_probs, retain_graph=True)

    mask, correct = fields["loss_mask"], fields["loss_mask"] * fields["correct"]
    mismatch = (fields["old_log_probs"] - fields["rollout_log_probs"]).exp()
    weight = mismatch.clamp(max=1.3)
    per_token = gppo(log_probs, fields["old_log_probs"], fields["advantages"], dual_clip=10)
    expected = (weight * per_token * mask).sum() / mask.sum() - 0.1 * (
        (log_probs * correct).sum() / correct.sum()
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    clipped = ((mismatch > 1.3) * mask).sum() / mask.sum()
    assert 0 < clipped < 1
    torch.testing.assert_close(result.sums["tis_clipped"], clipped)
    torch.testing.assert_close(result.sums["tis_weight"], (weight * mask).sum() / mask.sum())


@pytest.mark.parametrize(
    "objective",
    [
        PolicyObjective(GPPOConfig()),
        PolicyObjective(GPPOConfig(tis_clip=1.3)),
        PolicyObjective(GPPOConfig(token_mask=(0.6, 1.5))),
        PolicyObjective(GPPOConfig(aggregation="sequence_sum", sum_divisor=17)),
        SFTObjective(),
    ],
)
@pytest.mark.parametrize("cuts", [[1], [7, 8, 30], [40], [0, 13]])
def test_parts_of_a_mini_batch_add_up_to_the_whole(objective, cuts):
    log_probs, entropy, fields = make_fields()
    denominators = objective.denominators(fields, SEQUENCES)
    together = whole(objective, log_probs, entropy, fields)
    parts = [
        objective(
            log_probs[a:b],
            entropy[a:b],
            {k: v[a:b] for k, v in fields.items()},
            Sequences(SEQUENCES.ids[a:b], SEQUENCES.count),
            denominators,
        )
        for a, b in pairwise([0, *cuts, TOKENS])
    ]
    loss = sum(part.loss for part in parts)
    torch.testing.assert_close(loss, together.loss, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (loss, together.loss)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    for name, value in together.sums.items():
        total = sum(part.sums[name] for part in parts)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_entropy_bonus_is_aggregated_like_the_loss(aggregation):
    log_probs, entropy, fields = make_fields()
    entropy.requires_grad_()
    plain = PolicyObjective(GPPOConfig(aggregation=aggregation))
    bonus = PolicyObjective(GPPOConfig(aggregation=aggregation, entropy_coeff=0.3))
    assert (plain.entropy_gradient, bonus.entropy_gradient) == (False, True)
    before, after = (whole(one, log_probs, entropy, fields) for one in (plain, bonus))
    assert before.sums.keys() == after.sums.keys()
    parts = zip(entropy.split(LENGTHS), (fields["loss_mask"] > 0).split(LENGTHS), strict=True)
    rows = [part[mask] for part, mask in parts if mask.any()]
    expected = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": torch.stack([row.mean() for row in rows]).mean(),
        "sequence_sum": torch.stack([row.sum() for row in rows]).mean(),
    }[aggregation]
    torch.testing.assert_close(after.loss, before.loss - 0.3 * expected, rtol=1e-12, atol=0)
    actual, wanted = (
        torch.autograd.grad(x, entropy, retain_graph=True)[0] for x in (after.loss, -0.3 * expected)
    )
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-15)
    of_log_probs = [torch.autograd.grad(x.loss, log_probs)[0] for x in (before, after)]
    assert torch.equal(*of_log_probs)


def test_nothing_correct_or_nothing_trained_is_zero_and_not_nan():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(GPPOConfig())
    for empty in ("correct", "loss_mask"):
        changed = {**fields, empty: torch.zeros(TOKENS, dtype=torch.float64)}
        result = whole(objective, log_probs, entropy, changed)
        assert result.sums["sft_loss"] == 0
        assert all(math.isfinite(value) for value in result.sums.values())


def test_metrics_count_clipped_tokens_and_whose_gradient_is_kept():
    log_probs, entropy, fields = make_fields()
    ratio = (log_probs.detach() - fields["old_log_probs"]).exp()
    mask, advantages = fields["loss_mask"], fields["advantages"]
    low = ((ratio < 0.8) & (advantages < 0)).double() * mask
    high = ((ratio > 1.28) & (advantages > 0)).double() * mask
    assert low.sum() > 0
    assert high.sum() > 0
    for config, kept in (
        (GPPOConfig(), low + high),
        (GPPOConfig(beta_low=0), high),
        (GPPOConfig(beta_high=0), low),
        (PPOClipConfig(), torch.zeros(1)),
        (CISPOConfig(), low + high),
    ):
        sums = whole(PolicyObjective(config), log_probs, entropy, fields).sums
        torch.testing.assert_close(sums["clipped_low"], low.sum() / mask.sum())
        torch.testing.assert_close(sums["clipped_high"], high.sum() / mask.sum())
        torch.testing.assert_close(
            sums["clipped_gradient_kept"], kept.sum().double() / mask.sum(), msg=str(config)
        )


def test_extremes_are_those_of_trained_tokens():
    log_probs, entropy, fields = make_fields()
    fields["old_log_probs"][0] -= 30 + log_probs[0].detach()
    fields["loss_mask"][0] = 0
    objective = PolicyObjective(GPPOConfig())
    result = whole(objective, log_probs, entropy, fields)
    trained = fields["loss_mask"] > 0
    ratio = (log_probs.detach() - fields["old_log_probs"]).exp()[trained]
    assert result.extremes["ratio"].max() == max(ratio.max(), 1)
    assert result.extremes["ratio"].min() == min(ratio.min(), 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_without_a_finite_rollout_log_prob_are_left_out(value):
    log_probs, entropy, fields = make_fields()
    fields["loss_mask"][:4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    fields["correct"][:4] = 1.0
    objective = PolicyObjective(GPPOConfig(tis_clip=2.0))
    without = {**fields, "loss_mask": fields["loss_mask"].clone()}
    without["loss_mask"][1:3] = 0
    expected = whole(objective, log_probs, entropy, without)
    fields["rollout_log_probs"][1:4] = value  # the last one is not trained anyway
    actual = whole(objective, log_probs, entropy, fields)
    assert actual.loss == expected.loss
    assert actual.sums == expected.sums
    gradients = [torch.autograd.grad(r.loss, log_probs)[0] for r in (actual, expected)]
    assert torch.equal(*gradients)
    assert gradients[0].isfinite().all()
