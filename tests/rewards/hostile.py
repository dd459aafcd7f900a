"""What the tests with hostile programs share."""

import contextlib
import json
import os
import textwrap

import psutil
import pytest

from klear_megatron.rewards import CodeRewardConfig, code_reward

CONFIG = CodeRewardConfig(
    test_cpu_limit_s=5,
    test_wall_limit_s=5,
    cpu_limit_s=10,
    wall_limit_s=10,
    memory_mb=256,
    processes=16,
    output_mb=1,
    format_penalty=0,
)
SUM = json.dumps({"inputs": ["2 3", "3 4"], "outputs": ["5", "7"]})
SUM_CALLS = json.dumps({"inputs": [[2, 3], [3, 4]], "outputs": [5, 7], "fn_name": "add"})
SUM_CHECKS = ["assert add(2, 3) == 5", "assert add(3, 4) == 7"]


def respond(program):
    return f"<think></think>\n```python\n{textwrap.dedent(program)}\n```"


def grade(program, ground_truth=SUM, config=CONFIG):
    reward = code_reward(respond(program), ground_truth, config)
    assert sum(reward.parts.values()) == pytest.approx(1)
    return reward


def outcomes(reward):
    return {name.removeprefix("tests/"): share for name, share in reward.parts.items() if share}


def sandboxed_processes():
    """Processes of any sandbox, but those that other tests run now: the command line of the first
    one is that of all its forks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "/inside/main.py" in (process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                ancestors = [parent.pid for parent in process.parents()]
                if os.getpid() in ancestors or os.getppid() not in ancestors:
                    found.append(process)
    return found
