import math
import textwrap
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from klear_megatron.errors import UserError
from klear_megatron.losses import LossConfig, PolicyObjective, SFTObjective, gppo
from klear_megatron.losses.registry import resolve_loss

TOKENS = 40


def make_fields(seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """log-probabilities (a leaf), entropies and the fields of a mini-batch, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(TOKENS, generator=generator, dtype=torch.float64)

    log_probs = -random().abs()
    fields = {
        "old_log_probs": log_probs + random(0.4),
        "rollout_log_probs": log_probs + random(0.4),
        "advantages": random(),
        "loss_mask": (random() > -0.5).double(),
        "correct": (random() > 0).double(),
    }
    return log_probs.requires_grad_(), random().abs(), fields


def test_policy_objective_is_eq_7_plus_alpha_times_eq_14():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(LossConfig(sft_alpha=0.1))
    result = objective(log_probs, entropy, fields, objective.denominators(fields))
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
    objective = PolicyObjective(LossConfig(sft_alpha=0.1, tis_clip=1.3))
    result = objective(log_probs, entropy, fields, objective.denominators(fields))
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
    [PolicyObjective(LossConfig()), PolicyObjective(LossConfig(tis_clip=1.3)), SFTObjective()],
)
@pytest.mark.parametrize("cuts", [[1], [7, 8, 30], [40], [0, 13]])
def test_parts_of_a_mini_batch_add_up_to_the_whole(objective, cuts):
    log_probs, entropy, fields = make_fields()
    denominators = objective.denominators(fields)
    whole = objective(log_probs, entropy, fields, denominators)
    bounds = [0, *cuts, TOKENS]
    parts = [
        objective(
            log_probs[a:b], entropy[a:b], {k: v[a:b] for k, v in fields.items()}, denominators
        )
        for a, b in pairwise(bounds)
    ]
    loss = sum(part.loss for part in parts)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (loss, whole.loss)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    for name, value in whole.sums.items():
        total = sum(part.sums[name] for part in parts)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-15, msg=name)


def test_nothing_correct_or_nothing_trained_is_zero_and_not_nan():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(LossConfig())
    for empty in ("correct", "loss_mask"):
        changed = {**fields, empty: torch.zeros(TOKENS, dtype=torch.float64)}
        result = objective(log_probs, entropy, changed, objective.denominators(changed))
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
    for name, kept in (("gppo", low + high), ("ppo_clip", torch.zeros(1)), ("cispo", low + high)):
        objective = PolicyObjective(LossConfig(name=name))
        sums = objective(log_probs, entropy, fields, objective.denominators(fields)).sums
        torch.testing.assert_close(sums["clipped_low"], low.sum() / mask.sum())
        torch.testing.assert_close(sums["clipped_high"], high.sum() / mask.sum())
        torch.testing.assert_close(
            sums["clipped_gradient_kept"], kept.sum().double() / mask.sum(), msg=name
        )


def test_extremes_are_those_of_trained_tokens():
    log_probs, entropy, fields = make_fields()
    fields["old_log_probs"][0] -= 30 + log_probs[0].detach()
    fields["loss_mask"][0] = 0
    objective = PolicyObjective(LossConfig())
    result = objective(log_probs, entropy, fields, objective.denominators(fields))
    trained = fields["loss_mask"] > 0
    ratio = (log_probs.detach() - fields["old_log_probs"]).exp()[trained]
    assert result.extremes["ratio"].max() == max(ratio.max(), 1)
    assert result.extremes["ratio"].min() == min(ratio.min(), 1)


def test_negative_advantages_are_bounded_by_default_and_their_gradient_kept():
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -9.0]), torch.tensor([-1.0, -1.0])
    for name, expected in (("gppo", [1.0, 10.0]), ("ppo_clip", [1.0, 0.0])):
        loss = resolve_loss(LossConfig(name=name))(log_probs, old, advantages)
        assert loss.tolist() == [1.0, 10.0]
        assert torch.autograd.grad(loss.sum(), log_probs)[0].tolist() == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LossConfig(name="gpo"), "loss.name: 'gpo' is unknown; known: cispo, gppo, ppo_clip"),
        (LossConfig(options={"beta_lo": 3}), "beta_lo.*did you mean beta_low"),
        (
            LossConfig(name="cispo", options={"x": 1}),
            "no such option; there are: clip_low, ",
        ),
        (LossConfig(name="no_such_module:loss"), "cannot import 'no_such_module:loss'"),
        (LossConfig(name="math:loss"), "cannot import 'math:loss'"),
    ],
)
def test_loss_that_does_not_exist_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        resolve_loss(config)


def test_users_own_loss_needs_no_change_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        textwrap.dedent(
            """
            def reinforce(log_probs, old_log_probs, advantages, *, clip_low, clip_high, scale):
                return -scale * advantages * log_probs
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    log_probs, entropy, fields = make_fields()
    config = LossConfig(name="my_losses:reinforce", options={"scale": 3.0}, sft_alpha=0)
    objective = PolicyObjective(config)
    result = objective(log_probs, entropy, fields, objective.denominators(fields))
    mask = fields["loss_mask"]
    expected = -(3 * fields["advantages"] * log_probs * mask).sum() / mask.sum()
    torch.testing.assert_close(result.loss, expected)
