"""Every loss with every aggregation is its definition.

That it is the same in every layout: tests/policy/test_loss_layouts.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import DPPOConfig, LossConfig, LossInputs, PolicyObjective
from klear_megatron.losses.registry import default_losses, resolve_loss
from tests.losses.mini_batch import LENGTHS, SEQUENCES, make_fields, whole

OPTIONS: dict[str, dict[str, object]] = {
    "gppo": {"entropy_ratio": (0.5, 2.0)},
    "ppo_clip": {"entropy_ratio": (0.5, 2.0)},
    "gspo": {"clip_low": 0.1, "clip_high": 0.1},
    "dppo": {"bound_low": 0.02, "bound_high": 0.02},
}
"""So that some tokens of the mini-batch are clipped, and others are not."""
CONFIGS: list[LossConfig] = [
    *(config.model_copy(update=OPTIONS.get(config.name, {})) for config in default_losses()),
    DPPOConfig(divergence="kl", bound_low=0.01, bound_high=0.01),
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
