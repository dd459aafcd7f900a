"""Corrections of the mismatch between trainer and servers, against loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from klear_megatron.errors import UserError
from klear_megatron.losses import GPPOConfig, PolicyObjective, gppo, trained_tokens
from tests.losses.mini_batch import LENGTHS, SEQUENCES, TOKENS, make_fields, whole


def expected_mask(fields: dict[str, Tensor], config: GPPOConfig) -> Tensor:
    """Which tokens are trained, one after another."""
    ratios = (fields["old_log_probs"] - fields["rollout_log_probs"]).exp().tolist()
    drawn, kept, start = fields["loss_mask"].tolist(), [], 0
    for length in LENGTHS:
        rows = range(start, start + length)
        start += length
        mine = [ratios[t] for t in rows if drawn[t]]
        of_response = math.prod(mine)
        if config.sequence_mask_by == "geometric":
            of_response **= 1 / max(len(mine), 1)
        for t in rows:
            keep = drawn[t] > 0
            if config.token_mask is not None:
                keep &= config.token_mask[0] <= ratios[t] <= config.token_mask[1]
            if config.sequence_mask is not None:
                keep &= config.sequence_mask[0] <= of_response <= config.sequence_mask[1]
            kept.append(float(keep))
    return torch.tensor(kept, dtype=torch.float64)


CONFIGS = [
    GPPOConfig(token_mask=(0.6, 1.5)),  # IcePop
    GPPOConfig(token_mask=(0, 1.5), tis_clip=1.2, tis_floor=0.9),
    GPPOConfig(sequence_mask=(0.95, 1.2)),
    GPPOConfig(sequence_mask=(0.2, 2.0), sequence_mask_by="product", tis_clip=2),
    GPPOConfig(sequence_mask=(0.95, 1.2), token_mask=(0.5, 2.0), tis_clip=1.0, tis_floor=1.0),
    GPPOConfig(tis_clip=1.3, tis_floor=0.8),
]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: "-".join(sorted(one.model_fields_set)))
def test_what_is_masked_counts_nowhere_and_the_rest_is_weighted(config, aggregation):
    log_probs, entropy, fields = make_fields()
    config = config.model_copy(update={"aggregation": aggregation})
    mask = expected_mask(fields, config)
    assert torch.equal(trained_tokens(fields, SEQUENCES, config), mask)
    assert mask.any()
    masks = config.token_mask is not None or config.sequence_mask is not None
    assert (mask.sum() < fields["loss_mask"].sum()) == masks

    ratio = (fields["old_log_probs"] - fields["rollout_log_probs"]).exp()
    weight = ratio.clamp(config.tis_floor or 0, config.tis_clip or math.inf)
    losses = weight * gppo(log_probs, fields["old_log_probs"], fields["advantages"], dual_clip=10)
    parts = [
        part[kept > 0]
        for part, kept in zip(losses.split(LENGTHS), mask.split(LENGTHS), strict=True)
    ]
    by_token = aggregation == "token_mean"
    means = [part.mean() for part in ([torch.cat(parts)] if by_token else parts) if len(part)]
    correct = mask * fields["correct"]
    expected = torch.stack(means).mean() - 0.1 * (log_probs * correct).sum() / correct.sum()
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, log_probs)[0] for x in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)

    bounded = ((weight != ratio) * mask).sum() / mask.sum()
    torch.testing.assert_close(result.sums["tis_clipped"], bounded)
    torch.testing.assert_close(result.sums["tis_weight"], (weight * mask).sum() / mask.sum())


def test_the_product_of_many_ratios_may_be_larger_than_any_float():
    fields = {
        "old_log_probs": torch.zeros(TOKENS),
        "rollout_log_probs": torch.full((TOKENS,), -60.0),
        "loss_mask": torch.ones(TOKENS),
    }
    config = GPPOConfig(sequence_mask=(0, 1e30), sequence_mask_by="product")
    kept = trained_tokens(fields, SEQUENCES, config).split(LENGTHS)
    assert [part[0].item() for part in kept] == [0, 1, 0, 0]  # e^60 is 1e26


def test_everything_masked_is_zero_and_not_nan():
    log_probs, entropy, fields = make_fields()
    fields["rollout_log_probs"] = fields["old_log_probs"] - 9
    config = GPPOConfig(token_mask=(0.5, 2.0), aggregation="sequence_mean")
    result = whole(PolicyObjective(config), log_probs, entropy, fields)
    assert result.loss == 0
    assert all(value == 0 for value in result.sums.values())


@pytest.mark.parametrize(
    "options", [{"tis_clip": 2.0}, {"token_mask": (0.5, 2)}, {"sequence_mask": (0.5, 2)}]
)
def test_corrections_need_the_servers_log_probs(options):
    log_probs, entropy, fields = make_fields()
    del fields["rollout_log_probs"]
    with pytest.raises(UserError, match=r"loss: tis_clip, .* batch has no rollout_log_probs"):
        whole(PolicyObjective(GPPOConfig(**options)), log_probs, entropy, fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_mask": (1.1, 2)}, r"has to be \[low, high\] with 0 <= low <= 1 <= high"),
        ({"sequence_mask": (0.5, 0.9)}, r"has to be \[low, high\] with 0 <= low <= 1 <= high"),
        ({"tis_floor": 0.5}, "tis_floor has no effect without tis_clip or a mask"),
        ({"sequence_mask_by": "product"}, "no effect without sequence_mask"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPPOConfig(**options)
