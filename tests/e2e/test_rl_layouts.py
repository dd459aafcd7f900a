"""Reinforcement learning in every kind of layout, each with the same two servers."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from klear_megatron.config import load_config
from klear_megatron.data import PromptSampler
from klear_megatron.errors import Stopped
from klear_megatron.observability import RolloutFiles
from klear_megatron.policy.model import Model
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.loop import train_rl
from klear_megatron.rl.servers import PolicyServers
from klear_megatron.rollout import serving
from tests.distributed.ranks import run_ranks
from tests.files import read_rows
from tools.kill_training import count_prompts

PROMPTS, RESPONSES, STEPS = 4, 8, 2
BOUND = 1e-4
"""Largest difference between the trainer's and the servers' log-probabilities, in float32."""
CHANGES = {
    "steps": STEPS,
    "prompts_per_step": PROMPTS,
    "responses_per_prompt": RESPONSES,
    "prompts_per_mini_batch": PROMPTS // 2,
    # About half of the answers are right, so every step has groups to learn from.
    "rewards": {"custom": [{"function": "tests.even_reward:even"}], "workers": 1},
    # What needs the whole batch, whole responses, a second model or old entropies.
    "advantages": {"estimator": "reinforce_plus_plus_baseline"},
    "overlong": {"buffer": 8},
    "loss": {
        "name": "gppo",
        "entropy_ratio": [0.95, 1.1],
        "sequence_mask": [0.99, 1.01],
        "entropy_coeff": 0.01,
        "kl": {"coeff": 0.01},
    },
}


@dataclass(frozen=True)
class Running:
    urls: list[str]
    logs: list[Path]

    def requests(self) -> list[int]:
        """Of each server, how many requests for responses it has answered."""
        return [log.read_text().count("POST /generate") for log in self.logs]


@pytest.fixture(scope="module")
def two_servers(quickstart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    values = load_config(RLConfig, Path("examples/quickstart/rl.yaml")).rollout
    config = values.model_copy(update={"num_servers": 2})
    logs = tmp_path_factory.mktemp("logs")
    with serving(config, quickstart / "base", logs) as servers:
        yield Running(servers.urls, [logs / f"sglang_{i}.log" for i in range(2)])


@pytest.fixture
def config(make_config, quickstart, two_servers) -> Any:
    """The quickstart's RL with a larger learning rate, so that stale weights are far off."""

    def make(parallel: dict[str, int]) -> RLConfig:
        path = make_config("rl", **CHANGES)
        config = load_config(RLConfig, path, ["--policy.path", str(quickstart / "base")])
        values = config.model_dump()
        values["policy"] |= {"parallel": parallel, "optimizer": {"lr": 1e-3}}
        values["rollout"]["urls"] = two_servers.urls
        return RLConfig.model_validate(values)

    return make


@pytest.mark.parametrize(
    ("parallel", "leaders"),
    [
        ({}, 2),
        ({"tensor_model_parallel_size": 2}, 1),
        ({"pipeline_model_parallel_size": 2}, 1),
        ({"context_parallel_size": 2}, 1),
    ],
    ids=["dp2", "tp2", "pp2", "cp2"],
)
def test_servers_and_trainer_agree_after_each_push(
    parallel, leaders, config, two_servers, quickstart
):
    before = two_servers.requests()
    run = config(parallel)
    run_ranks(2, train_rl, run, timeout=300)
    rows = read_rows(run.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    # Only true if weights, prompts and responses all arrived where they belong.
    assert all(0 < row["rollout/log_prob_difference_max"] < BOUND for row in rows)
    # The reference is the policy before its first step, whose weights the servers have too.
    assert [row["rollout/kl_to_reference"] > 0 for row in rows] == [False, True]
    assert [row["rollout/masked_sequences"] for row in rows] == [0, 0]
    assert all(0 <= row["train/entropy_clipped"] < 1 for row in rows)
    assert all(row["train/kl_to_reference"] > 0 for row in rows)
    for row in rows:
        assert 2 * row["rollout/requests_per_server_mean"] == PROMPTS
        assert 0 < row["rollout/requests_per_server_min"] <= PROMPTS / 2
    sampler = PromptSampler(len(read_rows(quickstart / "train.jsonl")), run.seed)
    for step in range(1, STEPS + 1):
        dumps = list((run.run_dir / "rollouts").glob(f"step_{step:08}_*.jsonl"))
        assert len(dumps) == leaders
        responses = [row for dump in dumps for row in read_rows(dump)]
        drawn = sorted(sampler.next_batch(PROMPTS) * RESPONSES)
        assert sorted(row["index"] for row in responses) == drawn
        assert {row["weight_version"] for row in responses} == {str(step - 1)}
    for url in two_servers.urls:
        assert httpx.get(f"{url}/model_info", timeout=30).json()["weight_version"] == str(STEPS)
    after = two_servers.requests()
    # Requests go to the server with fewer in flight, so each gets a good part of them.
    assert all(now - then >= PROMPTS * STEPS // 4 for now, then in zip(after, before, strict=True))


def _train_with_stale_servers(config: RLConfig) -> None:
    first: list[Any] = []
    original = Model.own_hf_tensors

    def own_hf_tensors(self: Model) -> Iterator[Any]:
        if not first:
            first.extend((name, tensor.clone()) for name, tensor in original(self))
        return iter(first)

    Model.own_hf_tensors = own_hf_tensors
    train_rl(config)


def test_the_bound_would_catch_stale_weights(config):
    run = config({})
    run_ranks(1, _train_with_stale_servers, run, timeout=300)
    first, second = read_rows(run.run_dir / "metrics.jsonl")
    assert first["rollout/log_prob_difference_max"] < BOUND
    assert second["rollout/log_prob_difference_max"] > 10 * BOUND


def _told_as_it_draws(config: RLConfig, step: int) -> bool:
    """Whether the run stopped. Both ranks get SIGTERM as this step draws."""
    told: list[threading.Timer] = []
    original = PolicyServers.persist

    def persist(self: PolicyServers, draw: Any) -> None:
        if self.version == step - 1 and not told:
            # With staleness, the step waits for what is drawn already.
            delay = 0 if config.max_staleness else 0.3
            told.append(threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)))
            told[0].start()
        original(self, draw)

    PolicyServers.persist = persist  # type: ignore[method-assign]
    try:
        train_rl(config)
    except Stopped:
        return True
    return False


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_that_is_told_to_stop_as_it_draws_loses_no_prompt(max_staleness, config):
    values = config({}).model_dump() | {"max_staleness": max_staleness, "steps": 3}
    if max_staleness:  # with the probabilities of the drawing, which need no correction
        values |= {"old_log_probs": "server", "loss": {"name": "gppo"}}
    values["sampling"] |= {"max_response_length": 190}
    values["rollout"] |= {"max_running_requests": 4}  # so that drawing takes a while
    run = RLConfig.model_validate(values)
    assert run_ranks(2, _told_as_it_draws, run, 2, timeout=300) == [True, True]
    (checkpoint,) = (run.run_dir / "checkpoints").glob("step_*")
    steps = [row["step"] for row in read_rows(run.run_dir / "metrics.jsonl")]
    assert checkpoint.name == f"step_{steps[-1]:08}"
    if not max_staleness:  # it did not wait for the responses
        assert steps == [1]
        assert not list((run.run_dir / "rollouts").glob("step_00000002_*"))
    run_ranks(2, train_rl, run, timeout=300)
    assert [row["step"] for row in read_rows(run.run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert count_prompts(run)["trained"] > 0
    files = RolloutFiles(run.run_dir)
    rows = [row for step in files.steps() for row in files.read(step) if row["old_log_probs"]]
    same = [row["old_log_probs"] == row["rollout_log_probs"] for row in rows]
    assert rows
    assert all(same) == bool(max_staleness)  # a short one may be the same by chance
