"""The per-token losses against the paper's equations, written out in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import cispo, gppo, ppo_clip

LOW, HIGH, DUAL = 0.2, 0.28, 3.0
# Across every boundary: 1 - LOW, 1, 1 + HIGH and DUAL, from both sides and exactly on them.
RATIOS = [1e-3, 0.5, 0.79, 0.8, 0.81, 0.999, 1.0, 1.001, 1.27, 1.28, 1.29, 2.0, 2.99, 3.0, 3.01, 50]
ADVANTAGES = [-2.5, -1.0, -1e-3, 0.0, 1e-3, 0.7, 3.0]


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities (a leaf), old log-probabilities and advantages of every combination."""
    pairs = torch.tensor(list(itertools.product(RATIOS, ADVANTAGES)), dtype=torch.float64)
    old = torch.linspace(-9, -0.1, len(pairs), dtype=torch.float64)
    return (old + pairs[:, 0].log()).requires_grad_(), old, pairs[:, 1]


def value_and_gradient(loss, log_probs: Tensor, *args: Tensor, **options):
    value = loss(log_probs, *args, **options)
    return value.detach(), torch.autograd.grad(value.sum(), log_probs)[0]


def eq_11_17(log_probs, old, advantages, beta_low=1.0, beta_high=1.0):
    """min(d A, clip(d, b1 (1-e_l)/sg(d) d, b2 (1+e_h)/sg(d) d) A) as written, differentiated by
    autograd; which branch is taken is decided by d against the clip range."""
    ratio = (log_probs - old).exp()
    constant = ratio.detach()
    low = beta_low * (1 - LOW) / constant * ratio
    high = beta_high * (1 + HIGH) / constant * ratio
    clipped = torch.where(constant < 1 - LOW, low, torch.where(constant > 1 + HIGH, high, ratio))
    bounded_side = ((constant < 1 - LOW) & (advantages < 0)) | (
        (constant > 1 + HIGH) & (advantages > 0)
    )
    return -torch.where(bounded_side, clipped * advantages, ratio * advantages)


def eq_12_18(ratio, advantages, beta_low=1.0, beta_high=1.0):
    """F, case by case."""
    factors = []
    for d, a in zip(ratio.tolist(), advantages.tolist(), strict=True):
        if d < 1 - LOW and a < 0:
            factors.append(beta_low * (1 - LOW))
        elif d > 1 + HIGH and a > 0:
            factors.append(beta_high * (1 + HIGH))
        else:
            factors.append(d)
    return torch.tensor(factors, dtype=torch.float64)


@pytest.mark.parametrize(("beta_low", "beta_high"), [(1.0, 1.0), (0.75, 1.0), (1.0, 0.3), (2.0, 0)])
def test_gppo_is_the_papers(beta_low, beta_high):
    log_probs, old, advantages = grid()
    betas = {"beta_low": beta_low, "beta_high": beta_high}
    value, gradient = value_and_gradient(gppo, log_probs, old, advantages, **betas)
    expected, expected_gradient = value_and_gradient(eq_11_17, log_probs, old, advantages, **betas)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    factor = eq_12_18((log_probs - old).exp().detach(), advantages, **betas)
    torch.testing.assert_close(gradient, -factor * advantages, rtol=1e-12, atol=1e-12)


def test_gppo_has_clip_highers_value_as_eq_11_defines_it():
    log_probs, old, advantages = grid()
    ratio = (log_probs - old).exp()
    minimum = torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)
    torch.testing.assert_close(gppo(log_probs, old, advantages), -minimum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("high", [LOW, HIGH], ids=["symmetric", "clip-higher"])
def test_ppo_clip_is_its_definition(high):
    log_probs, old, advantages = grid()

    def definition(log_probs, old, advantages):
        ratio = (log_probs - old).exp()
        clipped = ratio.clamp(1 - LOW, 1 + high)
        # `where` and not `minimum`, whose gradient at a tie is half of each.
        smaller = (ratio * advantages).detach() <= (clipped * advantages).detach()
        return -torch.where(smaller, ratio * advantages, clipped * advantages)

    actual = value_and_gradient(ppo_clip, log_probs, old, advantages, clip_high=high)
    expected = value_and_gradient(definition, log_probs, old, advantages)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_cispo_is_eq_16():
    log_probs, old, advantages = grid()
    value, gradient = value_and_gradient(cispo, log_probs, old, advantages)
    factors = [
        1 - LOW if d < 1 - LOW else 1 + HIGH if d > 1 + HIGH else d
        for d in (log_probs - old).exp().tolist()
    ]
    expected = -torch.tensor(factors, dtype=torch.float64) * advantages
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_dual_clip_bounds_the_loss_and_gppo_keeps_the_gradient_unless_told():
    log_probs, old, advantages = grid()
    ratio = (log_probs - old).exp().detach()
    beyond = (ratio > DUAL) & (advantages < 0)
    unbounded, unbounded_gradient = value_and_gradient(gppo, log_probs, old, advantages)
    expected = torch.where(beyond, -DUAL * advantages, unbounded)
    kept = torch.where(beyond, -DUAL * advantages, unbounded_gradient)
    stopped = unbounded_gradient.masked_fill(beyond, 0)

    def close(actual, value, gradient):
        torch.testing.assert_close(actual[0], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(actual[1], gradient, rtol=1e-12, atol=1e-12)

    arguments = log_probs, old, advantages
    close(value_and_gradient(gppo, *arguments, dual_clip=DUAL), expected, kept)
    authors = {"dual_clip": DUAL, "dual_clip_keeps_gradient": False}
    close(value_and_gradient(gppo, *arguments, **authors), expected, stopped)
    value, gradient = value_and_gradient(ppo_clip, *arguments, dual_clip=DUAL)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert not gradient[beyond].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [gppo, ppo_clip, cispo])
def test_finite_however_far_apart_the_policies_are(loss, dtype):
    log_ratios = torch.tensor([s * 10**e for s in (-1, 1) for e in (-3, 0, 1, 1.9, 2, 3, 4)])
    log_ratio, advantage = torch.cartesian_prod(log_ratios, torch.tensor([-3.0, 0.0, 3.0])).T
    log_probs = log_ratio.clamp(max=0).to(dtype).requires_grad_()
    old = (-log_ratio).clamp(max=0).to(dtype)
    value, gradient = value_and_gradient(loss, log_probs, old, advantage.to(dtype))
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_bounded_gradients_stay_nonzero_where_the_ratio_underflows():
    log_probs = torch.tensor([-1e4, -200.0, -90.0], requires_grad=True)
    _, gradient = value_and_gradient(gppo, log_probs, torch.zeros(3), torch.full((3,), -2.0))
    torch.testing.assert_close(gradient, torch.full((3,), 1.6))


def test_any_shape_is_a_batch_of_tokens():
    log_probs, old, advantages = (t.detach()[:12] for t in grid())
    flat = gppo(log_probs, old, advantages)
    cube = gppo(*(t.reshape(2, 3, 2) for t in (log_probs, old, advantages)))
    assert torch.equal(cube.flatten(), flat)
    assert math.prod(gppo(*(t[:0] for t in (log_probs, old, advantages))).shape) == 0
