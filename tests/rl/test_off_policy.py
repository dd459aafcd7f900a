"""The point of GPPO: tokens whose ratio has left the clip range still learn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from klear_megatron.losses import GPPOConfig, PolicyObjective, PPOClipConfig
from klear_megatron.policy.batch import Batch
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny

LENGTH = 24
LOSSES = {"gppo": GPPOConfig(), "ppo_clip": PPOClipConfig()}
SEQUENCES = tiny.random_sequences([LENGTH] * 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("off_policy") / "qwen3", tiny.qwen3())


def _stale_batch(log_probs: torch.Tensor, log_ratio: float, advantage: float) -> Batch:
    """A batch in which all tokens have this log-ratio to the old policy and this advantage."""
    ones = [[1.0] * LENGTH for _ in SEQUENCES]
    batch = Batch.from_sequences(SEQUENCES, loss_mask=ones, correct=[[0.0] * LENGTH] * 4)
    advantages = torch.full_like(log_probs, advantage)
    return batch.with_fields(old_log_probs=log_probs - log_ratio, advantages=advantages)


def _step(checkpoint: Path, loss: str, log_ratio: float, advantage: float) -> Any:
    """The change of each token's log-probability in one optimizer step, and the step's metrics."""
    learner = make_learner(checkpoint, optimizer={"lr": 1e-3, "weight_decay": 0.0})
    plain = Batch.from_sequences(SEQUENCES)
    before, _ = learner.model.log_probs(plain)
    batch = _stale_batch(before, log_ratio, advantage)
    metrics = learner.train_step(batch, PolicyObjective(LOSSES[loss]))
    after, _ = learner.model.log_probs(plain)
    predicted = torch.arange(len(before)) % LENGTH > 0
    return (after - before)[predicted], metrics


# Far below the range with a negative advantage, and far above it with a positive one.
CLIPPED = [(-1.0, -1.0, "clipped_low"), (1.0, 1.0, "clipped_high")]


@pytest.mark.parametrize(("log_ratio", "advantage", "metric"), CLIPPED)
def test_gppo_moves_clipped_tokens_and_clip_higher_does_not(
    checkpoint, log_ratio, advantage, metric
):
    ((change, metrics),) = run_ranks(1, _step, checkpoint, "gppo", log_ratio, advantage)
    assert (change.mean() * advantage) > 0.05  # towards what is better than average
    assert metrics[metric] == pytest.approx((LENGTH - 1) / LENGTH)
    assert metrics["clipped_gradient_kept"] == metrics[metric]
    assert metrics["grad_norm"] > 0.1

    ((change, metrics),) = run_ranks(1, _step, checkpoint, "ppo_clip", log_ratio, advantage)
    assert not change.any()
    assert metrics[metric] == pytest.approx((LENGTH - 1) / LENGTH)
    assert metrics["clipped_gradient_kept"] == 0
    assert metrics["grad_norm"] == 0
