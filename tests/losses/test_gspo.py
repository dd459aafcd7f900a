"""GSPO against the paper's equations, written out in float64."""

import torch
from torch import Tensor

from klear_megatron.losses import GSPOConfig, PolicyObjective, Sequences

LOW, HIGH = 3e-4, 4e-4
RATIOS = [0.9, 1 - 3.1e-4, 1 - 2.9e-4, 1.0, 1 + 3.9e-4, 1 + 4.1e-4, 1.2]
ADVANTAGES = [-1.5, 0.7]


def responses() -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """For every ratio and advantage a prompt of two tokens and a response of three or more, whose
    tokens' ratios have that geometric mean."""
    generator = torch.Generator().manual_seed(0)
    log_probs, old, advantages, mask, lengths = [], [], [], [], []
    for ratio in RATIOS:
        for advantage in ADVANTAGES:
            length = 3 + len(lengths) % 4
            noise = torch.randn(length, dtype=torch.float64, generator=generator)
            log_ratios = torch.tensor(ratio, dtype=torch.float64).log() + noise - noise.mean()
            prompt = torch.tensor([0.0, -50.0], dtype=torch.float64)
            log_probs.append(torch.cat([prompt, -3 - noise**2]))
            old.append(torch.cat([prompt * 2, -3 - noise**2 - log_ratios]))
            advantages.append(torch.full((2 + length,), advantage, dtype=torch.float64))
            mask.append(torch.tensor([0.0] * 2 + [1.0] * length, dtype=torch.float64))
            lengths.append(2 + length)
    fields = {
        "old_log_probs": torch.cat(old),
        "advantages": torch.cat(advantages),
        "loss_mask": torch.cat(mask),
        "correct": torch.zeros(sum(lengths), dtype=torch.float64),
    }
    return torch.cat(log_probs).requires_grad_(), fields, lengths


def eq_5(log_probs: Tensor, fields: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, float]:
    """-1/G sum_i min(s_i A_i, clip(s_i) A_i) with s_i of Eq. 7, for autograd to differentiate, and
    the share of tokens that it clips."""
    terms, clipped, tokens = [], 0, 0
    start = 0
    for length in lengths:
        rows = slice(start + 2, start + length)
        start += length
        ratio = (log_probs[rows] - fields["old_log_probs"][rows]).mean().exp()
        advantage = fields["advantages"][start - 1]
        terms.append(torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage))
        tokens += length - 2
        outside = ratio < 1 - LOW if advantage < 0 else ratio > 1 + HIGH
        clipped += (length - 2) * int(outside)
    return -torch.stack(terms).mean(), clipped / tokens


def test_value_and_gradient_are_eq_5():
    log_probs, fields, lengths = responses()
    sequences = Sequences.whole(lengths)
    objective = PolicyObjective(GSPOConfig(sft_alpha=0))
    denominators = objective.denominators(fields, sequences)
    result = objective(log_probs, -log_probs.detach(), fields, sequences, denominators)
    expected, clipped = eq_5(log_probs, fields, lengths)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    actual, wanted = (torch.autograd.grad(x, log_probs)[0] for x in (result.loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-14)
    assert 0 < clipped < 1
    share = result.sums["clipped_low"] + result.sums["clipped_high"]
    torch.testing.assert_close(share.item(), clipped)
    assert result.sums["clipped_gradient_kept"] == 0


def test_finite_however_far_apart_the_policies_are():
    for log_ratio in (-1e4, 1e4):
        log_probs = torch.full((4,), min(log_ratio, 0.0), requires_grad=True)
        fields = {
            "old_log_probs": torch.full((4,), -max(log_ratio, 0.0)),
            "advantages": torch.tensor([-3.0, -3.0, 3.0, 3.0]),
            "loss_mask": torch.ones(4),
            "correct": torch.zeros(4),
        }
        sequences = Sequences.whole([2, 2])
        objective = PolicyObjective(GSPOConfig())
        denominators = objective.denominators(fields, sequences)
        result = objective(log_probs, torch.zeros(4), fields, sequences, denominators)
        assert result.loss.isfinite()
        assert torch.autograd.grad(result.loss, log_probs)[0].isfinite().all()
