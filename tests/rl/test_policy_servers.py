"""A server that is killed during a push still gets the weights."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from klear_megatron.checkpoints.model_folder import ModelFolder
from klear_megatron.losses import SFTObjective
from klear_megatron.policy.batch import Batch
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout import SamplingConfig
from tests.distributed.laboratory import make_learner, weights
from tests.distributed.ranks import run_ranks
from tests.models import tiny
from tests.rollout.conftest import CONFIG
from tests.servers import log_prob_difference, server_at

PROMPTS = tiny.random_sequences([5] * 16, seed=3)


def _scenario(checkpoint: Path, folder: Path) -> Any:
    """On rank 0: the policy's weights, the responses drawn after a sync in which one of the servers
    was killed, and what was printed during the sync."""
    learner = make_learner(
        checkpoint, parallel={"pipeline_model_parallel_size": 2}, optimizer={"lr": 1e-2}
    )
    sequences = tiny.random_sequences([20] * 8)
    learner.train_step(Batch.from_sequences(sequences, loss_mask=[[1.0] * 20] * 8), SFTObjective())
    config = RLConfig.model_validate(
        {
            "run_dir": folder,
            "steps": 1,
            "policy": learner.config.model_dump(),
            "data": {"path": folder},
            "rollout": CONFIG.model_dump(),
        }
    )
    main = dist.get_rank() == 0
    stream = learner.model.own_hf_tensors

    def stream_and_kill() -> Iterator[tuple[str, Tensor]]:
        for number, named in enumerate(stream()):
            if main and number == 10:
                server_at(servers._urls[0]).kill()
            yield named
        learner.model.own_hf_tensors = stream

    with contextlib.ExitStack() as stack:
        servers = PolicyServers(learner.model, config, ModelFolder(checkpoint), stack, leads=main)
        learner.model.own_hf_tensors = stream_and_kill
        with contextlib.redirect_stdout(io.StringIO()) as said:
            servers.sync(1)
        drawn: list[Any] = []
        sampling = SamplingConfig(max_response_length=20)
        servers.persist(lambda generator: drawn.extend(generator.generate(PROMPTS, sampling)))
        return weights(learner), drawn, said.getvalue()


def test_push_in_which_a_server_is_killed_is_made_again(tmp_path):
    checkpoint = tiny.write(tmp_path / "qwen3", tiny.qwen3())
    tiny.write_tokenizer(checkpoint)
    (trained, drawn, said), _ = run_ranks(2, _scenario, checkpoint, tmp_path, timeout=400)
    assert "starting all servers again" in said
    assert len(drawn) == len(PROMPTS)
    model = tiny.load(checkpoint)
    model.load_state_dict(trained)
    for prompt, (response,) in zip(PROMPTS, drawn, strict=True):
        assert response.weight_version == "1"
        assert log_prob_difference(model, prompt, response) < 1e-4
