"""A loss that needs whole sequences is the same in every layout, however their tokens are cut.

Here the loss of each token is multiplied by a function of its sequence's mean and sum, through
which gradients flow too. Under context parallelism they flow to tokens on other ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klear_megatron.losses import CustomLossConfig, LossInputs, PolicyObjective, TokenLoss
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


def expected_loss(log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same, sequence by sequence; and the mean of the factor."""
    mask, old, advantages = (
        batch.fields[name].double() for name in ("loss_mask", "old_log_probs", "advantages")
    )
    loss, total_factor = log_probs.new_zeros(()), log_probs.new_zeros(())
    start = 0
    for length in batch.lengths:
        rows = slice(start, start + length)
        start += length
        trained, log_prob = mask[rows], log_probs[rows]
        total = ((log_prob - old[rows]) * trained).sum()
        factor = (total / trained.sum().clamp(min=1)).exp() * (2 + (total / 20).sin())
        loss = loss - (factor * advantages[rows] * log_prob * trained).sum()
        total_factor = total_factor + factor * trained.sum()
    return loss / mask.sum(), total_factor / mask.sum()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    tokens = sum(LENGTHS)
    firsts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    mask[firsts] = 0  # nothing predicts them
    return Batch.from_sequences(tiny.random_sequences(LENGTHS, seed=3)).with_fields(
        loss_mask=mask,
        correct=torch.zeros(tokens),
        old_log_probs=-5 + 0.3 * torch.randn(tokens, generator=generator),
        advantages=torch.randn(tokens, generator=generator),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sequences") / "qwen3", tiny.qwen3())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[float, float, dict[str, Tensor]]:
    """In float64, by Hugging Face and autograd."""
    batch, model = make_batch(), tiny.load(checkpoint).double()
    sequences = tiny.random_sequences(LENGTHS, seed=3)
    log_probs, _ = tiny.hf_log_probs(model, sequences)
    loss, factor = expected_loss(log_probs, batch)
    loss.backward()
    return (
        loss.item(),
        factor.item(),
        as_in_files({name: p.grad for name, p in model.named_parameters()}),
    )


def _step(path: Path, parallel: dict[str, Any], tokens: int) -> Any:
    learner = laboratory.make_learner(path, parallel=parallel, tokens_per_micro_batch=tokens)
    config = CustomLossConfig(name=f"{__name__}:coupled", sft_alpha=0)
    return laboratory.train(learner, [make_batch()], PolicyObjective(config))[0]


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
    loss, factor, gradients = expected
    for metrics, _ in ranks:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["factor"] == pytest.approx(factor, rel=1e-5)
    ours = ranks[0][1]
    assert ours.keys() == gradients.keys()
    errors = {name: tiny.relative_error(ours[name], gradients[name]) for name in gradients}
    assert max(errors.values()) < 1e-5, errors
