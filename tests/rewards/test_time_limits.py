"""CPU time decides, whatever else the host does; the wider limit by the clock ends what waits."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from klear_megatron.rewards import (
    CodeRewardConfig,
    Job,
    MathRewardConfig,
    RewardConfig,
    RewardPool,
    code_reward,
)
from tests.rewards.hostile import outcomes
from tests.rewards.test_code import respond

CPU_LIMIT_S = 2.0
BURN = "import time\nstart = time.process_time()\nwhile time.process_time() - start < {}: pass\n"
SPIN = "while True: pass"


@pytest.fixture
def busy_host():
    """One core for everything in the test, its graders included, and eight processes that spin."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    # In sessions of their own, which the kernel gives as much as that of the sandbox.
    spinners = [
        subprocess.Popen([sys.executable, "-c", SPIN], start_new_session=True) for _ in range(8)
    ]
    yield
    for spinner in spinners:
        spinner.kill()
        spinner.wait()
    os.sched_setaffinity(0, cores)


def limits(**values):
    return CodeRewardConfig(**{"test_cpu_limit_s": 0.5, "test_wall_limit_s": 20, **values})


SCRIPT = BURN.format(0.5) + "print(sum(map(int, input().split())))"
FUNCTION = f"def add(a, b):\n{textwrap.indent(BURN.format(0.5), '    ')}    return a + b"
RIGHT = {
    "script": (SCRIPT, json.dumps({"inputs": ["2 3"], "outputs": ["5"]})),
    "call": (FUNCTION, json.dumps({"inputs": [[2, 3]], "outputs": [5], "fn_name": "add"})),
    "check": (FUNCTION, ["assert add(2, 3) == 5"]),
}


@pytest.mark.parametrize(("program", "tests"), RIGHT.values(), ids=RIGHT)
def test_right_programs_pass_on_a_busy_host(busy_host, program, tests):
    config = limits(test_cpu_limit_s=CPU_LIMIT_S)
    start = time.monotonic()
    assert code_reward(respond(program), tests, config).correct
    assert time.monotonic() - start > CPU_LIMIT_S  # by the clock alone, it would have failed


def test_right_answers_count_on_a_busy_host(busy_host):
    nested = "(" * 12 + "4" + ")" * 12
    config = RewardConfig(math=MathRewardConfig(cpu_limit_s=CPU_LIMIT_S), workers=1)
    with RewardPool(config) as pool:
        pool.grade([Job("math_longcot_math_verify", "", "4")])
        start = time.monotonic()
        response = f"<think></think>\\boxed{{{nested}}}"
        assert pool.grade([Job("math_longcot_math_verify", response, "4")])[0].correct
        assert time.monotonic() - start > CPU_LIMIT_S


ONE_TEST = json.dumps({"inputs": [""], "outputs": [""]})


def test_cpu_time_of_all_processes_of_a_program_counts():
    """Four processes of 0.4 s each are within no limit of 1 s together."""
    program = "import os\nos.fork()\nos.fork()\n" + BURN.format(0.4) + "time.sleep(1000)"
    start = time.monotonic()
    reward = code_reward(respond(program), ONE_TEST, limits(test_cpu_limit_s=1.0))
    assert outcomes(reward) == {"time": 1}
    assert time.monotonic() - start < 10
    alone = BURN.format(0.4)
    assert code_reward(respond(alone), ONE_TEST, limits(test_cpu_limit_s=1.0)).correct


def test_cpu_time_of_children_that_have_ended_counts():
    program = (
        "import os\nfor _ in range(10):\n    if os.fork() == 0:\n        break\n    os.wait()\n"
        "else:\n    print('all')\n    raise SystemExit\n" + BURN.format(0.2)
    )
    reward = code_reward(respond(program), ONE_TEST, limits(test_cpu_limit_s=1.0))
    assert outcomes(reward) == {"time": 1}


def test_program_that_waits_for_ever_is_ended_by_the_clock():
    start = time.monotonic()
    reward = code_reward(
        respond("import time\ntime.sleep(1e6)"), ONE_TEST, limits(test_wall_limit_s=1.0)
    )
    assert outcomes(reward) == {"time": 1}
    assert 1 <= time.monotonic() - start < 10


def test_cpu_time_of_all_tests_together_is_limited():
    tests = json.dumps({"inputs": [""] * 10, "outputs": [""] * 10})
    config = limits(test_cpu_limit_s=1.0, cpu_limit_s=2.0)
    reward = code_reward(respond(BURN.format(0.4)), tests, config)
    assert reward.timed_out
    assert 0.3 <= reward.parts["tests/passed"] <= 0.5
    assert reward.parts["tests/passed"] + reward.parts["tests/time"] == pytest.approx(1)


def test_without_a_sandbox_the_same_limits_hold():
    config = limits(sandbox="unsafe", test_cpu_limit_s=0.5)
    assert outcomes(code_reward(respond(SPIN), ONE_TEST, config)) == {"time": 1}
