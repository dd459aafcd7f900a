"""Losses that need whole sequences are the same in every layout, however their tokens are cut.

`coupled` multiplies the loss of each token by a function of its sequence's mean and sum, through
which gradients flow, too: under context parallelism to tokens on other ranks.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.losses import (
    CustomLossConfig,
    GSPOConfig,
    LossInputs,
    PolicyLossConfig,
    PolicyObjective,
    TokenLoss,
)
from klear_megatron.policy.batch import Batch
from tests.distributed import laboratory
from tests.distributed.ranks import run_ranks
from tests.distributed.reference import as_in_files
from tests.models import tiny

# Of one token, too; on some context-parallel ranks the short ones have only padding.
LENGTHS = [30, 3, 17, 1, 9, 22, 2, 12]
SIZE = "{}_parallel_size".format
TP, PP, CP = SIZE("tensor_model"), SIZE("pipeline_model"), SIZE("context")


def coupled(inputs: LossInputs) -> TokenLoss:
    log_ratio = inputs.log_probs - inputs.old_log_probs
    means = inputs.sequences.means(log_ratio, inputs.mask)
    sums = inputs.sequences.sums(log_ratio * inputs.mask)
    factor = inputs.sequences.spread(means.exp() * (2 + (sums / 20).sin()))
    return TokenLoss(-factor * inputs.advantages * inputs.log_probs, {"factor": factor.detach()})


CLIP = 0.03
CONFIGS: dict[str, PolicyLossConfig] = {
    "coupled": CustomLossConfig(name=f"{__name__}:coupled", sft_alpha=0),
    "gspo": GSPOConfig(clip_low=CLIP, clip_high=CLIP, sft_alpha=0),
}


def expected_loss(log_probs: Tensor, batch: Batch, loss: str) -> Tensor:
    """The same, sequence by sequence; GSPO as Eq. 5 of arXiv 2507.18071."""
    columns = [batch.fields[name] for name in ("loss_mask", "old_log_probs", "advantages")]
    terms, tokens = [], 0
    for log_prob, mask, old, advantage in zip(
        *(column.split(batch.lengths) for column in (log_probs, *columns)), strict=True
    ):
        trained = mask > 0
        if not trained.any():
            continue
        log_ratio = (log_prob - old)[trained]
        tokens += len(log_ratio)
        if loss == "coupled":
            factor = log_ratio.mean().exp() * (2 + (log_ratio.sum() / 20).sin())
            terms.append(-(factor * advantage * log_prob)[trained].sum())
        else:
            ratio, gain = log_ratio.mean().exp(), advantage[0]
            terms.append(-torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain))
    return torch.stack(terms).sum() / (tokens if loss == "coupled" else len(terms))


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    tokens = sum(LENGTHS)
    firsts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    mask[firsts] = 0  # nothing predicts them
    return Batch.from_sequences(tiny.random_sequences(LENGTHS, seed=3)).with_fields(
        loss_mask=mask,
        correct=torch.zeros(tokens),
        # About what an untrained model gives every token, so some sequences are clipped.
        old_log_probs=-math.log(tiny.VOCAB) + 0.3 * torch.randn(tokens, generator=generator),
        advantages=torch.cat(
            [torch.randn(1, generator=generator).expand(length) for length in LENGTHS]
        ),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sequences") / "qwen3", tiny.qwen3())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradients in float64, by Hugging Face and autograd."""
    batch, model = make_batch(), tiny.load(checkpoint).double()
    found = {}
    for loss in CONFIGS:
        log_probs, _ = tiny.hf_log_probs(model, tiny.random_sequences(LENGTHS, seed=3))
        value = expected_loss(log_probs, batch, loss)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value, parameters)
        found[loss] = value.item(), as_in_files(dict(zip(names, gradients, strict=True)))
    return found


def _step(path: Path, parallel: dict[str, Any], tokens: int) -> Any:
    clipped = torch.zeros(sum(LENGTHS), dtype=torch.int8)
    learner = laboratory.make_learner(path, parallel=parallel, tokens_per_micro_batch=tokens)
    of_all = learner.train_step(make_batch(), PolicyObjective(CONFIGS["gspo"]), clipped)
    dist.all_reduce(clipped, dist.ReduceOp.MAX)
    shares = [(clipped == side).sum().item() for side in (1, 2)]
    trained = make_batch().fields["loss_mask"].sum()
    for name, share in zip(("clipped_low", "clipped_high"), shares, strict=True):
        assert share / trained == pytest.approx(of_all[name])
    return {
        loss: laboratory.train(
            laboratory.make_learner(path, parallel=parallel, tokens_per_micro_batch=tokens),
            [make_batch()],
            PolicyObjective(config),
        )[0]
        for loss, config in CONFIGS.items()
    }


@pytest.mark.parametrize(
    ("world_size", "parallel", "tokens"),
    [
        (1, {}, 1000),
        (1, {}, 32),
        (2, {}, 32),
        (2, {TP: 2}, 32),
        (2, {PP: 2}, 32),
        (2, {CP: 2}, 16),
        (2, {CP: 2}, 1000),
        (4, {CP: 4}, 8),
        (4, {CP: 2, TP: 2}, 16),
        (4, {CP: 2, PP: 2}, 16),
        (4, {CP: 2}, 16),
    ],
)
def test_sums_over_sequences_in_every_layout(checkpoint, expected, world_size, parallel, tokens):
    ranks = run_ranks(world_size, _step, checkpoint, parallel, tokens)
    for loss, (value, gradients) in expected.items():
        for rank in ranks:
            metrics, _ = rank[loss]
            assert metrics["loss"] == pytest.approx(value, rel=1e-5)
        if loss == "gspo":
            assert 0 < metrics["clipped_low"] + metrics["clipped_high"] < 1
        _, ours = ranks[0][loss]
        assert ours.keys() == gradients.keys()
        errors = {name: tiny.relative_error(ours[name], gradients[name]) for name in gradients}
        assert max(errors.values()) < 1e-5, errors
