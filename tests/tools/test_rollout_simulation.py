"""The simulation agrees with what can be computed by hand, and keeps the promises of the run."""

import random
from typing import Any

import pytest

from klear_megatron.rollout.dispatch import Capacity
from tools.rollout_simulation import Scenario, simulate
from tools.simulated_server import Speed


def scenario(**changes: Any) -> Scenario:
    """16 prompts of 8 responses of 100 tokens, all at once on two servers in 1 s; training takes
    2 s and a push half a second."""
    settings: dict[str, Any] = {
        "servers": 2,
        "leaders": 2,
        "prompts_per_step": 16,
        "responses_per_prompt": 8,
        "max_staleness": 0,
        "draw_length": lambda draw: 100,
        "prompt_tokens": 10,
        "informative": 1.0,
        "max_generation_batches": 2,
        "speed": Speed(0.01, 0, 0, 0),
        "capacity": Capacity(64, 10**9),
        "leader_token_s": 0.0,
        "grade_s": 0.0,
        "train_s": lambda lengths: 2.0,
        "push_s": 0.5,
    }
    return Scenario(**settings | changes)


def test_without_staleness_the_parts_of_a_step_follow_each_other():
    result = simulate(scenario())
    assert result.step_s == pytest.approx(1 + 2 + 0.5)
    assert result.trainer_idle == pytest.approx(1 / 3.5)
    assert result.servers_idle == pytest.approx(2.5 / 3.5)
    assert result.in_flight == pytest.approx(64 / 3.5)
    assert result.tokens_per_step == 16 * 8 * 100
    assert result.max_staleness == 0


def test_with_staleness_generation_is_hidden_behind_training():
    result = simulate(scenario(max_staleness=1))
    assert result.step_s == pytest.approx(2 + 0.5)
    assert result.trainer_idle == 0
    assert result.staleness == result.max_staleness == 1


def test_half_the_places_take_twice_the_time():
    assert simulate(scenario(capacity=Capacity(32, 10**9))).step_s == pytest.approx(2 + 2 + 0.5)
    # The cache has room for 32 sequences of 110 tokens, once the leaders know their length.
    tight = scenario(capacity=Capacity(64, 32 * 110))
    assert simulate(tight).step_s == pytest.approx(2 + 2 + 0.5)


def test_a_decode_step_reads_the_cache_of_all_sequences():
    speed = Speed(step_s=0.01, sequence_s=0.001, cached_token_s=1e-6, prefill_token_s=0.002)
    drawn = 100 * (0.01 + 64 * 0.001) + 64 * 1e-6 * (10 * 100 + 100**2 / 2)
    read = 8 * 10 * 0.002
    assert simulate(scenario(speed=speed)).step_s == pytest.approx(drawn + read + 2.5)


def test_groups_that_teach_nothing_cost_another_round():
    result = simulate(scenario(informative=0.5))
    assert result.step_s == pytest.approx(2 + 2.5)
    assert result.tokens_per_step <= 16 * 8 * 100


def test_leaders_read_one_response_after_another_and_grading_comes_after():
    slow = scenario(leader_token_s=1e-4, grade_s=3.0)
    assert simulate(slow).step_s == pytest.approx(1 + 8 * 8 * 100 * 1e-4 + 3 + 2.5)


@pytest.mark.parametrize("staleness", [1, 2])
def test_long_responses_are_neither_too_stale_nor_dropped(staleness):
    def long_tailed(draw: random.Random) -> int:
        return min(2000, round(draw.lognormvariate(4, 1.2)))

    settings = {"draw_length": long_tailed, "informative": 0.7, "train_s": lambda lengths: 0.1}
    fresh = simulate(scenario(**settings, max_generation_batches=9), steps=100)
    stale = simulate(scenario(**settings, max_staleness=staleness), steps=100)
    assert stale.max_staleness == staleness
    assert stale.step_s < 0.8 * fresh.step_s
    assert stale.tokens_per_step == pytest.approx(fresh.tokens_per_step, rel=0.04)
