"""A prompt's time is limited, but not while it waits for room at a server."""

import asyncio

import pytest

from klear_megatron.rollout import GenerationError, Generator, RolloutConfig, SamplingConfig, clocks
from tests.stub_servers import StubServers, running


def draw(prompts: int, seconds_each: float, limit_s: float) -> None:
    async def generate(prompt: list[int]) -> list[float | None]:
        await asyncio.sleep(seconds_each)
        return [-1.0]

    with running(StubServers(1, 1, generate)) as stubs:  # one at a time; the others wait there
        config = RolloutConfig(request_timeout_s=limit_s, token_timeout_s=0)
        generator = Generator(stubs.urls, config, vocab_size=9, stop_token_ids=[])
        generator.generate([[1]] * prompts, SamplingConfig(max_response_length=1))


def test_waiting_for_room_does_not_count(monkeypatch):
    monkeypatch.setattr(clocks, "LOOK_EVERY_S", 0.02)
    draw(8, seconds_each=0.25, limit_s=1.0)


def test_an_answer_that_is_not_waited_for_in_vain_is_too_late(monkeypatch):
    monkeypatch.setattr(clocks, "LOOK_EVERY_S", 0.02)
    with pytest.raises(GenerationError, match=r"no answer to 3 requests; .* within 0.1 s"):
        draw(1, seconds_each=5.0, limit_s=0.1)
