"""GMPO, SAPO, DPPO, REINFORCE and entropy ratio clipping against their papers' equations, written
out in float64 and differentiated by autograd."""

import math

import pytest
import torch
from torch import Tensor

from klear_megatron.errors import UserError
from klear_megatron.losses import (
    GMPOConfig,
    GPPOConfig,
    LossInputs,
    PolicyObjective,
    PPOClipConfig,
    REINFORCEConfig,
    SAPOConfig,
    Sequences,
    dppo,
    reinforce,
    sapo,
)
from klear_megatron.losses.registry import resolve_loss
from tests.losses.mini_batch import LENGTHS, make_fields, whole
from tests.losses.test_token_losses import grid, value_and_gradient


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gmpo_is_its_eq_4():
    """-1/G sum_i A_i (prod_t min(r^s, clip(r)^s)^s)^(1/n) with s = sign(A_i)."""
    log_probs, entropy, fields = make_fields()
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    of_response = signs * torch.tensor([0.5, 1.5, 2.0, 1.0])
    fields["advantages"] = Sequences.whole(LENGTHS).spread(of_response)
    terms, start, clipped = [], 0, 0.0
    for length, advantage in zip(LENGTHS, of_response.tolist(), strict=True):
        rows = slice(start, start + length)
        start += length
        mask = fields["loss_mask"][rows] > 0
        ratios = (log_probs[rows] - fields["old_log_probs"][rows])[mask].exp()
        if not len(ratios):
            continue
        sign = 1 if advantage > 0 else -1
        bounded = ratios.clamp(math.exp(-0.3), math.exp(0.4))
        chosen = torch.where(ratios**sign <= bounded**sign, ratios, bounded)
        clipped += (chosen != ratios).sum().item()
        terms.append(advantage * chosen.prod() ** (1 / len(ratios)))
    expected = -torch.stack(terms).mean()
    config = GMPOConfig(sft_alpha=0, clip_low=0.3)
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    close(result.loss, expected)
    close(*(torch.autograd.grad(x, log_probs)[0] for x in (result.loss, expected)))
    share = result.sums["clipped_low"] + result.sums["clipped_high"]
    close(share, torch.tensor(clipped / fields["loss_mask"].sum().item(), dtype=torch.float64))
    assert clipped > 0


def test_sapo_is_its_gate():
    log_probs, old, advantages = grid()

    def gate(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        ratio = (log_probs - old).exp()
        tau = 1.05 - 0.05 * (advantages > 0).double()
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages

    actual = value_and_gradient(sapo, log_probs, old, advantages)
    expected = value_and_gradient(gate, log_probs, old, advantages)
    close(actual, expected)
    on_policy = (log_probs == old).nonzero()
    close(actual[1][on_policy], -advantages[on_policy])


def test_reinforce_is_the_policy_gradient_whatever_the_ratio():
    log_probs, _, advantages = grid()
    value, gradient = value_and_gradient(reinforce, log_probs, advantages)
    close(value, -advantages * log_probs.detach())
    close(gradient, -advantages)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_stops_what_leaves_the_trust_region(divergence):
    probabilities = torch.tensor([1e-4, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999], dtype=torch.float64)
    signs = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    new, old, advantages = torch.cartesian_prod(probabilities, probabilities, signs).T
    log_probs = new.log().requires_grad_()
    bounds = {"bound_low": 0.1, "bound_high": 0.3}
    options = {"divergence": divergence, "ratio_clip": 20.0, **bounds}
    value, gradient = value_and_gradient(dppo, log_probs, old.log(), advantages, **options)
    kl = old * (old / new).log() + (1 - old) * ((1 - old) / (1 - new)).log()
    distance = (new - old).abs() if divergence == "tv" else kl
    low = (new < old) & (distance > 0.1) & (advantages < 0)
    high = (new > old) & (distance > 0.3) & (advantages > 0)
    assert low.any()
    assert high.any()
    factor = (new / old).clamp(max=20)
    close(value, -factor * advantages)
    close(gradient, -factor * advantages * ~(low | high))


def test_dppo_has_its_authors_bounds_by_default():
    old = torch.tensor([0.5], dtype=torch.float64)
    for divergence, inside, outside in (("tv", 0.64, 0.66), ("kl", 0.65, 0.66)):
        for new, stopped in ((inside, False), (outside, True)):
            log_probs = torch.tensor([new], dtype=torch.float64).log().requires_grad_()
            _, gradient = value_and_gradient(
                dppo, log_probs, old.log(), torch.ones(1), divergence=divergence
            )
            assert (gradient == 0) == stopped, (divergence, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_finite_however_far_apart_the_policies_are(divergence, dtype):
    log_ratios = torch.tensor([s * 10**e for s in (-1, 1) for e in (-3, 0, 1, 1.9, 2, 3, 4)])
    log_ratio, advantage = torch.cartesian_prod(log_ratios, torch.tensor([-3.0, 0.0, 3.0])).T
    log_probs = log_ratio.clamp(max=0).to(dtype).requires_grad_()
    old = (-log_ratio).clamp(max=0).to(dtype)
    for loss in (lambda *args: dppo(*args, divergence=divergence), sapo):
        value, gradient = value_and_gradient(loss, log_probs, old, advantage.to(dtype))
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("config", [GPPOConfig, PPOClipConfig])
def test_entropy_ratio_clipping_leaves_only_tokens_whose_entropy_hardly_changed(config):
    log_probs, entropy, fields = make_fields()
    ratios = torch.tensor([0.5, 0.949, 0.951, 1.0, 1.099, 1.101, 2.0, 0.0], dtype=torch.float64)
    ratio = ratios.repeat(5)
    fields["old_entropy"] = (entropy / ratio).where(ratio > 0, entropy)
    entropy = entropy.masked_fill(ratio == 0, 0)
    kept = (ratio > 0.95) & (ratio < 1.1)
    plain = resolve_loss(config())(_inputs(log_probs, entropy, fields)).values
    expected = (plain * kept * fields["loss_mask"]).sum() / fields["loss_mask"].sum()
    objective = PolicyObjective(config(sft_alpha=0, entropy_ratio=(0.95, 1.1)))
    result = whole(objective, log_probs, entropy, fields)
    close(result.loss, expected)
    close(*(torch.autograd.grad(x, log_probs)[0] for x in (result.loss, expected)))
    share = (~kept * fields["loss_mask"]).sum() / fields["loss_mask"].sum()
    close(result.sums["entropy_clipped"], share)
    if config is GPPOConfig:
        clipped = result.sums["clipped_low"] + result.sums["clipped_high"]
        assert 0 < result.sums["clipped_gradient_kept"] < clipped


def test_two_entropies_of_zero_have_not_changed():
    log_probs, entropy, fields = make_fields()
    fields["old_entropy"] = entropy = entropy * 0
    config = PPOClipConfig(entropy_ratio=(0.95, 1.1))
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    assert result.sums["entropy_clipped"] == 0


def test_entropy_ratio_clipping_needs_the_old_entropies():
    log_probs, entropy, fields = make_fields()
    objective = PolicyObjective(GPPOConfig(entropy_ratio=(0.95, 1.1)))
    with pytest.raises(UserError, match=r"loss\.entropy_ratio: the batch has no old_entropy"):
        whole(objective, log_probs, entropy, fields)


def test_sequence_mean_is_how_gmpo_and_sapo_are_averaged():
    assert GMPOConfig().aggregation == SAPOConfig().aggregation == "sequence_mean"
    assert REINFORCEConfig().aggregation == "token_mean"


def _inputs(log_probs: Tensor, entropy: Tensor, fields: dict[str, Tensor]) -> LossInputs:
    return LossInputs(
        log_probs,
        fields["old_log_probs"],
        fields["advantages"],
        fields["loss_mask"],
        Sequences.whole(LENGTHS),
        entropy,
    )
