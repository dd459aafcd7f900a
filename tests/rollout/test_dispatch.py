"""All servers get their part of the work, however many leaders hand it out."""

import asyncio
import itertools
import threading
from collections import Counter

import numpy as np
import pytest

from klear_megatron.rollout import Generator, RolloutConfig, SamplingConfig, Share
from klear_megatron.rollout.dispatch import Capacity, Dispatch
from tests.stub_servers import StubServer, StubServers, running

GROUP = 8
SAMPLING = SamplingConfig(max_response_length=1)


def draw_all(servers: StubServers, leaders: int, prompts: int, max_running_requests: int) -> None:
    """Each leader draws the prompts that training deals to it, all leaders at the same time."""
    config = RolloutConfig(max_running_requests=max_running_requests)

    def lead(leader: int) -> None:
        generator = Generator(servers.urls, config, vocab_size=1000, stop_token_ids=[])
        mine = [[position] for position in range(leader, prompts, leaders)]
        generator.stream(
            mine,
            SAMPLING,
            lambda i, responses: done.append(mine[i]),
            responses_per_prompt=GROUP,
            share=Share(leader, leaders),
        )

    done: list[list[int]] = []
    threads = [threading.Thread(target=lead, args=(leader,)) for leader in range(leaders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [[position] for position in range(prompts)]


@pytest.mark.parametrize(("servers", "leaders"), [(8, 1), (8, 4), (5, 3), (2, 15), (15, 8)])
@pytest.mark.parametrize("prompts_per_server", [4, 16])
def test_the_busiest_server_has_little_more_than_the_mean(servers, leaders, prompts_per_server):
    async def generate(prompt: list[int]) -> list[float | None]:
        await asyncio.sleep(0.3)  # longer than it takes to hand out what the servers have room for
        return [-1.0]

    prompts = prompts_per_server * servers
    # As a config has it, where a server has room for many more.
    with running(StubServers(servers, 32, generate)) as stubs:
        draw_all(stubs, leaders, prompts, max_running_requests=32 * GROUP)
        loads = [len(server.prompts) for server in stubs.servers]
    assert sum(loads) == prompts
    assert max(loads) <= 1.25 * prompts / servers, loads


@pytest.mark.parametrize(("servers", "leaders"), [(4, 1), (4, 3), (3, 4)])
def test_no_server_is_idle_while_another_has_a_prompt_waiting(servers, leaders):
    rng = np.random.default_rng(3)
    # Long-tailed: a few prompts take as long as many others.
    seconds = itertools.cycle(np.minimum(rng.lognormal(-4, 1.5, 500), 1.0).tolist())
    places, prompts = 4, 160
    wrong: list[list[tuple[int, int]]] = []

    async def generate(prompt: list[int]) -> list[float | None]:
        await asyncio.sleep(next(seconds))
        return [-1.0]

    def seen(stubs: list[StubServer]) -> None:
        waits = any(server.waiting for server in stubs)
        if waits and not all(server.working for server in stubs):
            wrong.append([(server.working, server.waiting) for server in stubs])

    with running(StubServers(servers, places, generate, seen)) as stubs:
        draw_all(stubs, leaders, prompts, max_running_requests=places * GROUP)
        counts = [len(server.prompts) for server in stubs.servers]
    assert not wrong, wrong[:3]
    assert sum(counts) == prompts


def everywhere(servers: int, leaders: int, prompts: int, places: int) -> list[Counter[str]]:
    """Prompts in flight by server, for each leader, with all handed out that there is room for."""
    urls = [f"server {k}" for k in range(servers)]
    in_flight = []
    for leader in range(leaders):
        dispatch = Dispatch(urls, GROUP, Share(leader, leaders))
        for url in urls:
            dispatch.open(url, Capacity(places * GROUP, 10**6))
        loads: Counter[str] = Counter(dict.fromkeys(urls, 0))
        for position in range(len(range(leader, prompts, leaders))):
            if dispatch.has_place:
                loads[dispatch.enter(position)] += 1
        in_flight.append(loads)
    return in_flight


def test_leaders_together_load_servers_alike_and_never_beyond_their_places():
    for servers, leaders in itertools.product(range(1, 10), range(1, 17)):
        for prompts in range(4 * servers, 6 * servers + 1):
            loads = sum(everywhere(servers, leaders, prompts, places=32), Counter())
            assert max(loads.values()) - min(loads.values()) <= 1
        full = everywhere(servers, leaders, 100 * servers * leaders, places=32)
        assert set(sum(full, Counter()).values()) == {32}
        per_leader = [loads.total() for loads in full]
        assert max(per_leader) - min(per_leader) <= 1


def test_a_server_that_is_closed_gets_nothing_and_one_that_comes_back_catches_up():
    dispatch = Dispatch(["a", "b"], GROUP, Share())
    assert not dispatch.has_place
    dispatch.open("a", Capacity(4 * GROUP, 10**6))
    assert [dispatch.enter(position) for position in range(3)] == ["a"] * 3
    dispatch.open("b", Capacity(4 * GROUP, 10**6))
    assert [dispatch.enter(position) for position in range(3)] == ["b"] * 3
    dispatch.close("b")
    assert dispatch.enter(0) == "a"
    assert not dispatch.has_place
    dispatch.leave("a")
    assert dispatch.has_place


def in_flight(dispatch: Dispatch) -> Counter[str]:
    loads: Counter[str] = Counter()
    while dispatch.has_place:
        loads[dispatch.enter(loads.total())] += 1
    return loads


def test_a_server_gets_as_many_sequences_as_its_cache_holds_and_it_runs():
    dispatch = Dispatch(["small", "large"], GROUP, Share())
    dispatch.open("small", Capacity(sequences=16 * GROUP, tokens=10_000))
    dispatch.open("large", Capacity(sequences=16 * GROUP, tokens=100_000))
    dispatch.sequence_tokens = 500.0
    # 10,000 tokens are 20 sequences, or two groups of 8.
    assert in_flight(dispatch) == {"small": 2, "large": 16}
    dispatch.sequence_tokens = 100.0
    assert in_flight(dispatch) == {"small": 12 - 2}
    # Longer ones than before: nothing is taken away, and nothing given until there is room.
    dispatch.sequence_tokens = 1000.0
    for _ in range(11):
        dispatch.leave("small")
        dispatch.leave("large")
    assert in_flight(dispatch) == {"large": 12 - 5}


def test_places_follow_the_lengths_of_the_responses_that_come_back():
    """A server whose cache holds 3 groups of these responses never gets a fourth."""
    most = [0]

    async def generate(prompt: list[int]) -> list[float | None]:
        await asyncio.sleep(0.02)
        return [-1.0] * 99

    def seen(stubs: list[StubServer]) -> None:
        if len(stubs[0].prompts) > 32:  # after the first ones, which came before anything was known
            most[0] = max(most[0], stubs[0].working)

    with running(StubServers(1, 32, generate, seen, tokens=100 * GROUP * 3 + 50)) as stubs:
        draw_all(stubs, 1, 80, max_running_requests=16 * GROUP)
    assert most[0] == 3
