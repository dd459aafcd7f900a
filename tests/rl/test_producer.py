"""A producer keeps the buffer filled while weights change and servers come and go."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from klear_megatron.data import LoadedPrompts, Prompt
from klear_megatron.errors import UserError
from klear_megatron.models.tokenizer import read_tokenizer
from klear_megatron.rewards import RewardPool
from klear_megatron.rl.buffer import Buffer
from klear_megatron.rl.config import RLConfig
from klear_megatron.rl.groups import Group, GroupMaker
from klear_megatron.rl.producer import Producer
from klear_megatron.rollout import Generator, RolloutConfig, ServersLostError, Share
from tests.models import tiny
from tests.rl.test_groups import config_of
from tests.stub_servers import StubServers, running

PROMPTS = LoadedPrompts(
    [Prompt("marks", [{"role": "user", "content": ""}], "", i) for i in range(64)],
    [[i + 1] for i in range(64)],
    [],
    0,
)
PER_STEP = 4


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write(tmp_path_factory.mktemp("model"), tiny.qwen3(num_hidden_layers=1))
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def maker(tokenizer_folder: Path, request: pytest.FixtureRequest) -> Iterator[GroupMaker]:
    custom = {"function": request.param, "timeout_s": 1.0}
    values = config_of(tokenizer_folder).model_dump()
    config = RLConfig.model_validate(values | {"rewards": {"custom": [custom], "workers": 4}})
    with (
        RewardPool(config.rewards) as rewards,
        GroupMaker(config, read_tokenizer(tokenizer_folder), rewards, Share()) as maker,
    ):
        yield maker


def producer_of(maker: GroupMaker, urls: list[str], buffer: Buffer[Group]) -> Producer:
    config = RolloutConfig(max_running_requests=64)
    generator = Generator(urls, config, vocab_size=tiny.VOCAB, stop_token_ids=[])
    servers = SimpleNamespace(generator=generator, version=0)
    producer = Producer(PROMPTS, servers, maker, buffer)  # type: ignore[arg-type]
    producer.rows.extend(range(64))
    return producer


def rows_of(producer: Producer) -> list[int]:
    return [slot.row for slot in producer.take().slots]


async def answer(prompt: list[int]) -> list[float | None]:
    return [-1.0]


AT_ONCE = pytest.mark.parametrize("maker", ["tests.quick_reward:at_once"], indirect=True)


@AT_ONCE
def test_it_draws_as_far_ahead_as_the_version_allows(maker):
    with (
        running(StubServers(2, 8, answer)) as stubs,
        producer_of(maker, stubs.urls, Buffer(1, PER_STEP, 1)) as producer,
    ):
        asked = [server.prompts for server in stubs.servers]

        def wait_for(prompts: int) -> None:
            deadline = time.monotonic() + 20
            while sum(map(len, asked)) < prompts and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)  # no more than these
            assert sum(map(len, asked)) == prompts

        producer.wait()
        wait_for(2 * PER_STEP)
        assert rows_of(producer) == [0, 1, 2, 3]
        producer.wait()
        wait_for(2 * PER_STEP)  # those of step 2; for step 3 only with new weights
        producer._servers.version = 1
        wait_for(3 * PER_STEP)
        assert rows_of(producer) == [4, 5, 6, 7]


@AT_ONCE
def test_prompts_in_flight_are_asked_again_when_all_servers_were_lost(maker):
    restarted = False

    async def restarts(prompt: list[int]) -> list[float | None]:
        if prompt[0] > 2:
            await asyncio.sleep(0.3)
            stubs.version = "3" if restarted else "default"
        return [-1.0]

    with (
        running(StubServers(1, 8, restarts)) as stubs,
        producer_of(maker, stubs.urls, Buffer(1, PER_STEP, 1)) as producer,
    ):
        generator = producer._servers.generator
        assert generator is not None
        generator.weight_versions = frozenset({"0", "3"})
        with pytest.raises(ServersLostError, match=r"no server is left.* version default"):
            producer.wait()
        restarted = True
        generator.lost.clear()  # as a push does
        producer.wait()
        assert rows_of(producer) == [0, 1, 2, 3]
        asked = Counter(prompt[0] - 1 for prompt in stubs.servers[0].prompts)
        assert [asked[row] for row in range(8)] == [1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("maker", ["tests.wrong_reward:nothing"], indirect=True)
def test_a_reward_function_that_fails_is_reported_every_time(maker):
    with (
        running(StubServers(1, 8, answer)) as stubs,
        producer_of(maker, stubs.urls, Buffer(1, PER_STEP, 1)) as producer,
    ):
        for _ in range(2):
            with pytest.raises(UserError, match="returned None"):
                producer.wait()


@pytest.mark.parametrize("maker", ["tests.quick_reward:never"], indirect=True)
def test_a_reward_that_hangs_counts_as_wrong(maker):
    with (
        running(StubServers(1, 8, answer)) as stubs,
        producer_of(maker, stubs.urls, Buffer(0, 2, 1)) as producer,
    ):
        producer.wait()
        groups = [slot.group for slot in producer.take().slots]
        assert len(groups) == 2
        for group in groups:
            assert group is not None
            assert all(reward.timed_out and not reward.correct for reward in group.rewards)


@AT_ONCE
def test_it_ends_while_requests_are_in_flight(maker):
    async def first_step_only(prompt: list[int]) -> list[float | None]:
        await asyncio.sleep(0 if prompt[0] <= PER_STEP else 3600)
        return [-1.0]

    with running(StubServers(1, 8, first_step_only)) as stubs:
        with producer_of(maker, stubs.urls, Buffer(1, PER_STEP, 1)) as producer:
            producer.wait()
            taken = producer.take()
            assert taken.carried_over == PER_STEP
            start = time.monotonic()
        assert time.monotonic() - start < 5
        assert [slot.row for slot in producer.buffer.slots] == [4, 5, 6, 7]
