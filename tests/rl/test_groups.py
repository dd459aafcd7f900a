"""Groups are graded while others are drawn, keep the prompts' order, and lose none."""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from klear_megatron.data import LoadedPrompts, Prompt
from klear_megatron.errors import UserError
from klear_megatron.losses import AdvantageConfig, GPPOConfig, group_advantages
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.rewards import Job, Reward, RewardPool
from klear_megatron.rl.batches import batch_of, with_whitened_advantages
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group, GroupMaker, compared, penalised
from klear_megatron.rl.metrics import log_prob_metrics
from klear_megatron.rollout import Generator, Response, RolloutConfig, SamplingConfig, Share
from tests.models import tiny
from tests.stub_servers import StubServers, running

PROMPTS = 6


def config_of(folder: Path, function: str = "unused:unused") -> RLConfig:
    return RLConfig.model_validate(
        {
            "run_dir": folder,
            "steps": 1,
            "policy": {"path": folder, "optimizer": {"lr": 1e-6}},
            "data": {"path": folder},
            "responses_per_prompt": 2,
            "rewards": {"custom": [{"function": function}], "workers": 2},
        }
    )


@pytest.fixture
def maker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[GroupMaker]:
    """Grades by the function that the test names."""
    checkpoint = tiny.write(tmp_path / "model", tiny.qwen3(num_hidden_layers=1))
    tiny.write_tokenizer(checkpoint)
    config = config_of(tmp_path, request.param)
    with (
        RewardPool(config.rewards) as rewards,
        GroupMaker(config, read_tokenizer(checkpoint), rewards, Share()) as maker,
    ):
        # Starts its processes, which takes seconds.
        rewards.grade([Job("marks", "", str(tmp_path / "right"))])
        yield maker


def prompts_with(ground_truths: list[str]) -> LoadedPrompts:
    prompts = [
        Prompt("marks", [{"role": "user", "content": str(i)}], truth, i)
        for i, truth in enumerate(ground_truths)
    ]
    return LoadedPrompts(prompts, [[i + 1] for i in range(len(prompts))], [], 0)


def generator(stubs: StubServers, max_running_requests: int = 16) -> Generator:
    config = RolloutConfig(max_running_requests=max_running_requests)
    return Generator(stubs.urls, config, vocab_size=tiny.VOCAB, stop_token_ids=[])


@pytest.mark.parametrize("maker", ["tests.marking_reward:mark"], indirect=True)
def test_the_first_group_is_graded_before_the_last_response_has_arrived(maker, tmp_path):
    marks = [tmp_path / f"graded_{i}" for i in range(PROMPTS)]
    graded_when_last_was_sent: list[int] = []

    async def generate(prompt: list[int]) -> list[float | None]:
        if prompt == [PROMPTS]:  # the last one waits for the first to be graded, if not for ever
            for _ in range(200):
                if marks[0].exists():
                    break
                await asyncio.sleep(0.05)
            graded_when_last_was_sent.append(sum(mark.exists() for mark in marks))
        return [-1.0]

    making = maker.start(prompts_with([str(mark) for mark in marks]), range(PROMPTS))
    drawn: list[None] = []
    with running(StubServers(1, 8, generate)) as stubs:
        making.draw(generator(stubs), lambda: drawn.append(None))
    assert graded_when_last_was_sent[0] >= 1
    assert len(drawn) == PROMPTS
    groups = making.finish()
    assert [group.prompt.index for group in groups] == list(range(PROMPTS))
    assert all(group.informative for group in groups)
    for group in groups:
        scores = torch.tensor([reward.score for reward in group.rewards], dtype=torch.float64)
        expected = group_advantages(scores, torch.zeros(2, dtype=torch.int64))
        assert group.advantages == expected.tolist()


@pytest.mark.parametrize("maker", ["tests.marking_reward:mark"], indirect=True)
def test_only_what_is_missing_is_drawn_again(maker, tmp_path):
    truths = [str(tmp_path / f"graded_{i}") for i in range(PROMPTS)]
    making = maker.start(prompts_with(truths), [4, 0, 2])

    async def fails(prompt: list[int]) -> list[float | None]:
        if prompt == [1]:
            await asyncio.sleep(0.5)
            raise ConnectionError  # the connection is closed without an answer
        return [-1.0]

    with running(StubServers(1, 8, fails)) as stubs, pytest.raises(UserError, match="no answer"):
        making.draw(generator(stubs), lambda: None)

    async def works(prompt: list[int]) -> list[float | None]:
        return [-1.0]

    with running(StubServers(1, 8, works)) as stubs:
        making.draw(generator(stubs), lambda: None)
        assert stubs.servers[0].prompts == [[1]]
    assert [group.prompt.index for group in making.finish()] == [4, 0, 2]


@pytest.mark.parametrize("maker", ["tests.wrong_reward:nothing"], indirect=True)
def test_a_reward_function_that_fails_ends_the_drawing(maker, tmp_path):
    asked: list[int] = []

    async def generate(prompt: list[int]) -> list[float | None]:
        asked.append(prompt[0])
        await asyncio.sleep(0.3)
        return [-1.0]

    making = maker.start(prompts_with(["right"] + ["wrong"] * 99), range(100))
    with (
        running(StubServers(1, 1, generate)) as stubs,
        pytest.raises(UserError, match=r"returned None for a response to row \d+ of"),
    ):
        making.draw(generator(stubs, max_running_requests=2), lambda: None)
    assert len(asked) < 50


def group_of(rewards: list[Reward], log_probs: list[float]) -> Group:
    prompt = Prompt("marks", [], "", 0)
    responses = [Response([7] * len(log_probs), log_probs, "stop", "0") for _ in rewards]
    return Group(prompt, [1, 2], responses, [""] * len(rewards), rewards, [1.0] * len(rewards))


def test_only_a_right_answer_in_a_well_formed_response_is_imitated():
    rewards = [
        Reward(1.0, correct=True, formatted=True),
        Reward(0.5, correct=True, formatted=False),
        Reward(-1.0, correct=False, formatted=True),
    ]
    batch = batch_of([group_of(rewards, [-1.0, -2.0])], config_of(Path()))
    assert batch.fields["correct"].tolist() == [0, 0, 1, 1] + [0] * 8


def test_log_probs_that_are_not_finite_are_counted_and_leave_the_differences_alone():
    async def generate(prompt: list[int]) -> list[float | None]:
        return [-1.0, None, -3.0]  # as SGLang writes NaN and infinities

    with running(StubServers(1, 8, generate)) as stubs:
        drawn = generator(stubs).generate([[1, 2]], SamplingConfig())
    log_probs = drawn[0][0].log_probs
    assert log_probs[::2] == [-1.0, -3.0]
    assert math.isnan(log_probs[1])
    group = group_of([Reward(1.0, correct=True, formatted=True)], log_probs)
    batch = batch_of([group], config_of(Path()))
    ours = torch.tensor([0.0, 0.0, -1.5, -2.0, -3.25])
    metrics = log_prob_metrics(batch.with_fields(old_log_probs=ours), GPPOConfig())
    assert metrics == {
        "rollout/log_probs_not_finite": 1,
        "rollout/log_prob_difference_mean": 0.375,
        "rollout/log_prob_difference_max": 0.5,
    }


def test_masked_tokens_and_responses_are_counted_and_the_differences_are_those_of_all():
    rewards = [Reward(1.0, correct=True, formatted=True)] * 2
    batch = batch_of([group_of(rewards, [-1.0, math.nan, -1.0, -1.0])], config_of(Path()))
    ours = torch.tensor([0, 0, -1, -1, -1, -2, 0, 0, -2, -1, -2, -2])  # ratios 1 and exp(-1)
    batch = batch.with_fields(old_log_probs=ours.float())
    loss = GPPOConfig(token_mask=(0.5, 2), sequence_mask=(0.6, 2))
    assert log_prob_metrics(batch, loss) == pytest.approx(
        {
            "rollout/log_probs_not_finite": 2,
            "rollout/log_prob_difference_mean": 4 / 6,
            "rollout/log_prob_difference_max": 1,
            # The second response as a whole, by exp(-1), and one of three tokens of the first.
            "rollout/masked_tokens": 4 / 6,
            "rollout/masked_sequences": 1 / 2,
        }
    )


def test_a_step_is_whitened_over_its_trained_responses_and_rewards_alike_teach_nothing(tmp_path):
    config = RLConfig.model_validate(
        config_of(tmp_path).model_dump()
        | {"mask_truncated": True, "advantages": {"estimator": "reinforce_plus_plus"}}
    )
    groups = []
    for scores in ([1.0, 0.0], [3.0, 3.0], [2.0, 7.0]):
        rewards = [Reward(score, correct=False, formatted=True) for score in scores]
        group = group_of(rewards, [-1.0])
        responses = [*group.responses[:1], replace(group.responses[1], finish_reason="length")]
        one = compared(group.prompt, [1, 2], responses, ["", ""], rewards, config.advantages)
        assert one.advantages == scores
        assert one.informative == (scores[0] != scores[1])
        groups.append(one)
    batch = with_whitened_advantages(batch_of([groups[0], groups[2]], config))
    trained = batch.per_response["advantages"][::2]  # the others were cut off
    torch.testing.assert_close(trained, torch.tensor([-(0.5**0.5), 0.5**0.5]))


def test_rewards_alike_are_trained_on_only_if_they_are_not_dropped():
    rewards = [Reward(1.0, correct=True, formatted=True)] * 2
    group = group_of(rewards, [-1.0])
    for drop in (True, False):
        config = AdvantageConfig(drop_equal=drop)
        one = compared(group.prompt, [1, 2], group.responses, ["", ""], rewards, config)
        assert one.advantages == [0.0, 0.0]
        assert one.informative != drop


def test_long_responses_lose_reward_as_dapo_has_it():
    """Eq. 13 with L_max = 100 and L_cache = 20, here with twice the penalty."""
    settings = {
        "sampling": {"max_response_length": 100},
        "overlong": {"buffer": 20, "penalty": 2.0},
    }
    config = RLConfig.model_validate(config_of(Path()).model_dump() | settings)
    reward = Reward(1.0, correct=True, formatted=True, parts={"a": 3.0})
    for length, expected in ((1, 0.0), (80, 0.0), (85, -0.25), (99, -0.95), (100, -1.0)):
        after = penalised(reward, length, config)
        assert after.score == pytest.approx(1 + 2 * expected)
        assert after.parts == {"a": 3.0, "overlong": pytest.approx(2 * expected)}
        assert after.correct
    assert penalised(reward, 100, config_of(Path())) == reward
    with pytest.raises(ValueError, match=r"overlong.buffer \(101\) is more than the longest"):
        RLConfig.model_validate(config.model_dump() | {"overlong": {"buffer": 101}})
