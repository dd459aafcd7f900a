"""The servers compute with the trainer's weights after a sync, and only then."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from klear_megatron.losses import SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.policy.learner import Learner
from klear_megatron.rollout import Generator, RolloutConfig, SamplingConfig
from klear_megatron.rollout.weight_sender import WeightSyncError
from klear_megatron.rollout.weight_sync import WeightSync
from tests.distributed.laboratory import make_learner
from tests.distributed.ranks import run_ranks
from tests.models import tiny
from tests.rollout.conftest import SharedServers
from tests.servers import syncing

PROMPTS = [[5, 6, 7], [300, 2], [11] * 20, [4, 4, 8, 1]]
SAMPLING = SamplingConfig(max_response_length=24)


def _difference(learner: Learner, urls: list[str], config: RolloutConfig) -> list[float]:
    """The largest difference in log-probability between the trainer and each server, on the
    server's own samples."""
    differences = []
    for url in urls:
        generator = Generator([url], config, vocab_size=tiny.VOCAB, stop_token_ids=[])
        drawn = generator.generate(PROMPTS, SAMPLING, responses_per_prompt=2) if _main() else []
        pairs = [(p, r) for p, rs in zip(PROMPTS, drawn, strict=False) for r in rs]
        everyone = [[(p + r.token_ids, [0.0] * len(p) + r.log_probs) for p, r in pairs]]
        dist.broadcast_object_list(everyone)
        tokens, served = zip(*everyone[0], strict=True)
        batch = Batch.from_sequences(tokens, served=served)
        ours, _ = learner.model.log_probs(batch)
        drawn_tokens = batch.fields["served"] != 0
        differences.append((ours - batch.fields["served"])[drawn_tokens].abs().max().item())
    return differences


def _main() -> bool:
    return dist.get_rank() == 0


def _train(learner: Learner) -> None:
    sequences = tiny.random_sequences([20] * 8)
    batch = Batch.from_sequences(sequences, loss_mask=[[1.0] * 20] * 8)
    learner.train_step(batch, SFTObjective())


def _scenario(checkpoint: Path, urls: list[str], config: RolloutConfig, parallel: Any) -> Any:
    learner = make_learner(checkpoint, parallel=parallel, optimizer={"lr": 1e-2})
    seen = {}
    with WeightSync(urls, config, learner.model.placed_hf_tensors) as sync:
        for version in (1, 2):
            _train(learner)
            seen[f"before {version}"] = _difference(learner, urls, config)
            sync.push(learner.model.own_hf_tensors(), version)
            seen[f"after {version}"] = _difference(learner, urls, config)
    return seen


@pytest.mark.parametrize(
    "parallel",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}],
    ids=["TP2", "PP2", "DP2"],
)
def test_log_probs_agree_after_each_sync_and_not_before(servers, parallel):
    seen, _ = run_ranks(2, _scenario, servers.checkpoint, servers.urls, servers.config, parallel)
    for version in (1, 2):
        assert all(difference < 1e-4 for difference in seen[f"after {version}"])
        # Before the broadcast the comparison fails, because the weights have changed enough.
        assert all(difference > 1e-2 for difference in seen[f"before {version}"])
    for responses in servers.generator().generate(PROMPTS, SAMPLING):
        assert responses[0].weight_version == "2"


def _push(servers: SharedServers, tensors: dict[str, Tensor], config: RolloutConfig) -> None:
    with syncing(servers.urls, config, tensors) as sync:
        sync.push(iter(tensors.items()), version=7)


def _own_weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tiny.load(checkpoint).named_parameters()}


def test_servers_may_have_another_size_than_the_config_says(servers):
    # As with rollout.urls. A group with more ranks than they have would wait until its time-out.
    config = servers.config.model_copy(update={"tensor_parallel_size": 2, "sync_timeout_s": 30})
    _push(servers, _own_weights(servers.checkpoint), config)


def test_tensor_that_does_not_fit_is_reported_at_once_and_the_next_push_repairs(servers):
    tensors = _own_weights(servers.checkpoint)
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"http://\S+ cannot load the weights: .*\[7\]"):
        _push(servers, tensors | {"model.norm.weight": torch.ones(7)}, servers.config)
    assert time.monotonic() - start < servers.config.sync_timeout_s / 2
    _push(servers, tensors, servers.config)
    (reference,) = tiny.hf_log_probs(tiny.load(servers.checkpoint), [[1, 2, 3]])[:1]
    assert reference.isfinite().all()
    for url in servers.urls:
        (responses,) = servers.generator([url]).generate([[1, 2, 3]], SAMPLING)
        assert responses[0].weight_version == "7"
