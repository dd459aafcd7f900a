"""Losses by name, their options, and losses of the user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.config import Section, load_config, write_config
from klear_megatron.errors import UserError
from klear_megatron.losses import (
    CEGPPOConfig,
    CISPOConfig,
    DPPOConfig,
    GPPOConfig,
    GSPOConfig,
    LossConfig,
    LossInputs,
    PolicyObjective,
    PPOClipConfig,
    Sequences,
)
from klear_megatron.losses.registry import resolve_loss
from tests.losses.mini_batch import make_fields, whole

OWN = """
import json

import torch
from pydantic import Field
from klear_megatron.config import Section
from klear_megatron.losses import (
    TokenLoss, clipped_tokens, clipping_metrics, ratio_of, surrogate
)

class Options(Section):
    scale: float = Field(1.0, gt=0)

def reinforce(inputs):
    return TokenLoss(-inputs.advantages * inputs.log_probs, {"long": inputs.log_probs < -3})

def scaled(inputs, options: Options):
    return TokenLoss(-options.scale * inputs.advantages * inputs.log_probs)

def mean(inputs):
    return TokenLoss(-(inputs.advantages * inputs.log_probs).mean())

def tensor(inputs, options: Options):
    return -inputs.log_probs

def detached(inputs):
    return TokenLoss(-(inputs.advantages * inputs.log_probs).detach())

def misspelt(inputs):
    return TokenLoss(-inputs.logprobs)

def unreadable(inputs):
    return json.loads("{")

def left_alone(inputs):
    torch.distributed.all_reduce(inputs.log_probs)

class Clip(Section):
    low: float = Field(0.2, ge=0, lt=1)
    high: float = Field(0.28, ge=0)

def my_gppo(inputs, options: Clip):
    ratio = ratio_of(inputs.log_probs, inputs.old_log_probs)
    low, high = clipped_tokens(ratio, inputs.advantages, options.low, options.high)
    factor = ratio.masked_fill(low, 1 - options.low).masked_fill(high, 1 + options.high)
    return TokenLoss(
        surrogate(inputs.log_probs, factor, inputs.advantages),
        clipping_metrics(low, high, kept=low | high),
    )

def untyped(inputs, options):
    pass

def three(inputs, options: Options, more):
    pass

answer = 42
"""


class Config(Section):
    """As a run's config holds a loss."""

    loss: LossConfig = GPPOConfig()


@pytest.fixture(autouse=True)
def own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "own_losses.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def load(tmp_path: Path, loss: str) -> Any:
    (tmp_path / "config.yaml").write_text(f"loss: {loss}")
    return load_config(Config, tmp_path / "config.yaml").loss


def inputs(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> LossInputs:
    sequences = Sequences.whole([len(log_probs)])
    return LossInputs(log_probs, old, advantages, torch.ones(len(old)), sequences, -log_probs)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("{}", GPPOConfig()),
        ("{clip_low: 0.1, beta_low: 0.5}", GPPOConfig(clip_low=0.1, beta_low=0.5)),
        ("{name: ppo_clip, dual_clip: null}", PPOClipConfig(dual_clip=None)),
        ("{name: cispo, sft_alpha: 0}", CISPOConfig(sft_alpha=0)),
        ("{name: gspo, aggregation: token_mean}", GSPOConfig(aggregation="token_mean")),
        ("{name: ce_gppo, beta_high: 0.5}", CEGPPOConfig(beta_high=0.5)),
        ("{name: dppo, divergence: kl}", DPPOConfig(divergence="kl")),
        ("{entropy_ratio: [0.95, 1.1]}", GPPOConfig(entropy_ratio=(0.95, 1.1))),
    ],
)
def test_the_name_decides_which_options_there_are(tmp_path, loss, expected):
    assert load(tmp_path, loss) == expected


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{name: gppoo}", "loss.name: there is no loss 'gppoo' .*; did you mean gppo?"),
        ("{beta_lo: 3}", "loss.beta_lo: unknown key; did you mean beta_low?"),
        ("{name: cispo, dual_clip: 3}", "loss.dual_clip: unknown key; there are: .*clip_high"),
        ("{name: ppo_clip, clip_low: 1}", "loss.clip_low: .* less than 1; given: 1"),
        ("{name: own_losses:reinforce, sft_alpha: -1}", "loss.sft_alpha: .* greater than"),
        ("{sum_divisor: 9}", "loss: sum_divisor has no effect without .*sequence_sum"),
        ("{name: reinforce, clip_low: 0.1}", "loss.clip_low: unknown key"),
        ("{name: gspo, entropy_ratio: [0.9, 1.1]}", "loss.entropy_ratio: unknown key"),
        ("gppo", "loss: .* section with its keys; given: 'gppo'"),
    ],
)
def test_a_loss_or_option_that_does_not_exist_is_refused_with_the_config(tmp_path, loss, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, loss)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        ("{name: own_losses:reinforce}", 1.0),
        ("{name: own_losses:scaled}", 1.0),
        ("{name: own_losses:scaled, scale: 3, tis_clip: 2, kl: {coeff: 0.1}}", 3.0),
        ("{name: FILE:scaled, scale: 3}", 3.0),
    ],
)
def test_a_loss_of_the_users_own_has_the_options_it_declares(tmp_path, own_losses, loss, scale):
    config = load(tmp_path, loss.replace("FILE", str(own_losses)))
    log_probs, advantages = torch.tensor([-1.0, -4.0]), torch.tensor([2.0, -1.0])
    result = resolve_loss(config)(inputs(log_probs, log_probs, advantages))
    assert torch.equal(result.values, -scale * advantages * log_probs)
    expected = {"long": [False, True]} if config.name == "own_losses:reinforce" else {}
    assert {name: values.tolist() for name, values in result.metrics.items()} == expected


def test_a_loss_of_the_users_own_can_do_all_that_gppo_does(tmp_path):
    """Built of the same pieces, under the same aggregation, corrections, masks, SFT term, entropy
    bonus and penalty: the same bits."""
    shared = (
        "aggregation: sequence_mean, sft_alpha: 0.1, entropy_coeff: 0.01, kl: {coeff: 0.1}, "
        "tis_clip: 1.2, token_mask: [0.3, 3.0], sequence_mask: [0.8, 1.3]}"
    )
    log_probs, entropy, fields = make_fields()
    fields["ref_log_probs"] = log_probs.detach().roll(1)
    found = []
    for loss in (
        f"{{name: gppo, clip_low: 0.1, dual_clip: null, {shared}",
        f"{{name: own_losses:my_gppo, low: 0.1, {shared}",
    ):
        result = whole(PolicyObjective(load(tmp_path, loss)), log_probs, entropy, fields)
        (gradient,) = torch.autograd.grad(result.loss, log_probs)
        found.append((result.loss, gradient, result.sums))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][2]["clipped_gradient_kept"] > 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{name: no_such_module:f}", "loss.name: cannot import 'no_such_module"),
        ("{name: own_losses:f}", "loss.name: cannot import 'own_losses:f'"),
        ("{name: own_losses:answer}", "loss.name: 'own_losses:answer' is not a function"),
        ("{name: own_losses:untyped}", r"has to be f\(inputs\) or f\(inputs, options: Options\)"),
        ("{name: own_losses:three}", r"has to be f\(inputs\) or f\(inputs, options: Options\)"),
        ("{name: own_losses:reinforce, clip_low: 0.2}", "loss.clip_low: .* has no options"),
        (
            "{name: own_losses:scaled, scal: 2}",
            r"loss: options of own_losses:scaled:\n  scal: unknown key; did you mean scale?",
        ),
        (
            "{name: own_losses:scaled, scale: -2}",
            r"loss: options of own_losses:scaled:\n  scale: .* than 0; given: -2",
        ),
    ],
)
def test_a_loss_of_the_users_own_that_cannot_be_used_is_refused(tmp_path, loss, message):
    config = load(tmp_path, loss)
    with pytest.raises(UserError, match=message):
        resolve_loss(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"loss.name: own_losses:mean returned values of shape \(\) for 2 tokens"),
        ("tensor", "loss.name: own_losses:tensor returned Tensor, not a TokenLoss"),
        ("detached", "loss.name: own_losses:detached returned values without a gradient"),
    ],
)
def test_a_loss_of_the_users_own_that_is_not_per_token_is_refused(tmp_path, name, message):
    loss = resolve_loss(load(tmp_path, f"{{name: own_losses:{name}}}"))
    with pytest.raises(UserError, match=message):
        loss(inputs(torch.ones(2, requires_grad=True), *torch.ones(2, 2)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misspelt", "AttributeError: 'LossInputs' object has no attribute 'logprobs'"),
        ("unreadable", "JSONDecodeError: .*"),
    ],
)
def test_a_loss_of_the_users_own_that_fails_is_named_with_its_line(tmp_path, name, message):
    loss = resolve_loss(load(tmp_path, f"{{name: own_losses:{name}}}"))
    where = rf"\(.*/own_losses\.py, line {1 + OWN.split(f'def {name}')[0].count(chr(10)) + 1}\)"
    with pytest.raises(UserError, match=f"loss.name: own_losses:{name} failed: {message} {where}$"):
        loss(inputs(*torch.ones(3, 2)))


def test_ranks_that_have_ended_are_no_failure_of_a_loss(tmp_path):
    loss = resolve_loss(load(tmp_path, "{name: own_losses:left_alone}"))
    with pytest.raises(ValueError, match="process group"):
        loss(inputs(*torch.ones(3, 2)))


@pytest.mark.parametrize(
    "loss", ["{name: cispo, clip_low: 0.1}", "{name: own_losses:scaled, scale: 3}"]
)
def test_a_config_that_was_written_loads_as_the_same_loss(tmp_path, loss):
    config = load(tmp_path, loss)
    write_config(Config(loss=config), tmp_path / "written.yaml")
    assert load_config(Config, tmp_path / "written.yaml").loss == config


def test_negative_advantages_are_bounded_by_default_and_their_gradient_kept():
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -9.0]), torch.tensor([-1.0, -1.0])
    for config, expected in ((GPPOConfig(), [1.0, 10.0]), (PPOClipConfig(), [1.0, 0.0])):
        loss = resolve_loss(config)(inputs(log_probs, old, advantages)).values
        assert loss.tolist() == [1.0, 10.0]
        assert torch.autograd.grad(loss.sum(), log_probs)[0].tolist() == expected


def test_ce_gppo_scales_tokens_below_the_range_by_three_quarters():
    log_probs = torch.tensor([-9.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0, -9.0, -1.0, -9.0])
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    result = resolve_loss(CEGPPOConfig())(inputs(log_probs, old, advantages))
    expected = torch.tensor([0.75 * 0.8, -1.28, 1.0, 10.0])  # the last one by dual_clip
    torch.testing.assert_close(result.values, expected)
    (gradient,) = torch.autograd.grad(result.values.sum(), log_probs)
    torch.testing.assert_close(gradient, expected)
    assert result.metrics["clipped_gradient_kept"].tolist() == [True, True, False, False]
