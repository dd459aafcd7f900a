"""Every loss with every aggregation: its definition, and the same whatever the packs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import (
    CEGPPOConfig,
    CISPOConfig,
    DPPOConfig,
    GMPOConfig,
    GPPOConfig,
    GSPOConfig,
    LossConfig,
    LossInputs,
    PolicyObjective,
    PPOClipConfig,
    REINFORCEConfig,
    SAPOConfig,
    Sequences,
)
from klear_megatron.losses.registry import _LOSSES, resolve_loss
from tests.losses.mini_batch import LENGTHS, SEQUENCES, make_fields, whole

CONFIGS: list[LossConfig] = [
    GPPOConfig(entropy_ratio=(0.5, 2.0)),
    CEGPPOConfig(),
    PPOClipConfig(entropy_ratio=(0.5, 2.0)),
    CISPOConfig(),
    GSPOConfig(clip_low=0.1, clip_high=0.1),
    GMPOConfig(),
    SAPOConfig(),
    DPPOConfig(bound_low=0.02, bound_high=0.02),
    DPPOConfig(divergence="kl", bound_low=0.01, bound_high=0.01),
    REINFORCEConfig(),
]
AGGREGATIONS: dict[str, tuple[dict[str, object], Callable[[list[Tensor]], Tensor]]] = {
    "token_mean": ({}, lambda rows: torch.cat(rows).mean()),
    "sequence_mean": ({}, lambda rows: torch.stack([row.mean() for row in rows]).mean()),
    "sequence_sum": ({}, lambda rows: torch.stack([row.sum() for row in rows]).mean()),
    "constant": (
        {"aggregation": "sequence_sum", "sum_divisor": 100.0},  # as in Dr. GRPO
        lambda rows: torch.stack([row.sum() / 100 for row in rows]).mean(),
    ),
}
every_loss = pytest.mark.parametrize("loss", CONFIGS, ids=lambda one: one.name)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def mini_batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """With a sequence of which nothing is trained, which counts nowhere."""
    log_probs, entropy, fields = make_fields()
    fields["old_entropy"] = entropy.roll(1) + 0.1
    fields["loss_mask"][LENGTHS[0] + LENGTHS[1] :][: LENGTHS[2]] = 0
    return log_probs, entropy, fields


def configured(loss: LossConfig, aggregation: str) -> LossConfig:
    settings = {"aggregation": aggregation} | AGGREGATIONS[aggregation][0]
    return type(loss).model_validate(loss.model_dump() | settings | {"sft_alpha": 0})


def test_no_loss_is_left_out():
    assert {config.name for config in CONFIGS} == _LOSSES.keys()


@every_aggregation
@every_loss
def test_the_aggregation_is_its_definition(loss, aggregation):
    log_probs, entropy, fields = mini_batch()
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=fields["old_log_probs"],
        advantages=fields["advantages"],
        mask=fields["loss_mask"],
        sequences=SEQUENCES,
        entropy=entropy,
        old_entropy=fields["old_entropy"],
    )
    values = resolve_loss(loss)(inputs).values
    parts = zip(values.split(LENGTHS), (inputs.mask > 0).split(LENGTHS), strict=True)
    expected = AGGREGATIONS[aggregation][1]([part[m] for part, m in parts if m.any()])
    config = configured(loss, aggregation)
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, log_probs)[0] for x in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert gradients[0].any()


@every_aggregation
@every_loss
def test_packs_of_a_mini_batch_add_up_to_the_whole(loss, aggregation):
    """Sequences in other packs and another order, one of which is alone."""
    log_probs, entropy, fields = mini_batch()
    config = configured(loss, aggregation)
    objective = PolicyObjective(config.model_copy(update={"sft_alpha": 0.1}))
    together = whole(objective, log_probs, entropy, fields)
    denominators = objective.denominators(fields, SEQUENCES)
    results = []
    for pack in ([3, 0], [1], [2]):
        rows = torch.cat([(SEQUENCES.ids == i).nonzero()[:, 0] for i in pack])
        mine = {name: values[rows] for name, values in fields.items()}
        sequences = Sequences.whole([LENGTHS[i] for i in pack])
        results.append(objective(log_probs[rows], entropy[rows], mine, sequences, denominators))
    loss = sum(result.loss for result in results)
    torch.testing.assert_close(loss, together.loss, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, log_probs)[0] for x in (loss, together.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    for name, value in together.sums.items():
        total = sum(result.sums[name] for result in results)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-15, msg=name)
