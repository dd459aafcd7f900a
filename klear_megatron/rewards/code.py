"""Does the program in a response pass the tests of its problem?"""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence

from klear_megatron.rewards.code_tests import (
    CallTest,
    CheckTest,
    ScriptTest,
    Test,
    parse_tests,
    sample_tests,
)
from klear_megatron.rewards.comparison import outputs_agree, values_agree
from klear_megatron.rewards.config import CodeRewardConfig
from klear_megatron.rewards.reward import Reward, answer_of, is_formatted, score_with_format
from klear_megatron.rewards.sandbox import Sandbox, check_sandbox, memory_file
from klear_megatron.rewards.sandbox.inside.remote import Names, Tests

OUTCOMES = ("passed", "wrong", "error", "time", "memory", "output", "ended")
"""How a test can end. `time`, `memory` and `output` are limits that it reached; `time` includes the
limit on all tests of a program. `ended` means that it brought down its sandbox."""


def code_reward(
    response: str,
    ground_truth: str | Sequence[str],
    config: CodeRewardConfig = CodeRewardConfig(),
) -> Reward:
    """Grade the last program of a response's answer by the tests in `ground_truth`.

    The answer is what follows the last `</think>`. Its program is the last block fenced by ```
    that is marked as Python; without one, the last block without a mark. `parse_tests` lists the
    formats of tests. `parts` has the share of the tests with each of OUTCOMES.

    Raises:
        UserError: the ground truth has no tests, or there is no sandbox to run programs in.
    """
    tests = sample_tests(parse_tests(ground_truth), config.max_tests, config.test_seed)
    program = extract_program(answer_of(response))
    outcomes: Counter[str] = Counter()
    if program is not None:
        check_sandbox(config)
        for outcome in run_tests(program, tests, config):
            outcomes[outcome] += 1
            if config.mode == "hard" and outcome != "passed":
                break
    return score_program(response, config, len(tests), outcomes)


def score_program(
    response: str, config: CodeRewardConfig, num_tests: int, outcomes: Counter[str]
) -> Reward:
    """The reward of a response whose program has been tested."""
    correct = outcomes["passed"] == num_tests
    if config.mode == "soft":
        score = outcomes["passed"] / num_tests
    else:
        score = config.correct if correct else config.wrong
    return Reward(
        score=score_with_format(score, response, config),
        correct=correct,
        formatted=is_formatted(response),
        timed_out=outcomes["time"] > 0,
        parts={f"tests/{outcome}": outcomes[outcome] / num_tests for outcome in OUTCOMES},
    )


def extract_program(answer: str) -> str | None:
    """The last fenced block marked as Python; without one, the last unmarked block, or None."""
    programs: dict[bool, str] = {}
    block: list[str] | None = None
    mark = ""
    for line in answer.split("\n"):
        if block is None:
            if line.lstrip().startswith("```"):
                block, mark = [], line.strip().strip("`").strip().lower()
        elif line.strip() == "```":
            if mark in ("python", "python3", "py", ""):
                programs[bool(mark)] = "\n".join(block)
            block = None
        else:
            block.append(line)
    return programs.get(True, programs.get(False))


def run_tests(program: str, tests: Sequence[Test], config: CodeRewardConfig) -> Iterator[str]:
    """The outcome of each test, in order; the tests are all of one kind."""
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(config, config.wall_limit_s))
        sandbox.load("script" if isinstance(tests[0], ScriptTest) else "module", program)
        if isinstance(tests[0], CheckTest):
            # A second sandbox: the program must not see the tests' code, which may be hostile too.
            checker = stack.enter_context(Sandbox(config, config.wall_limit_s))
        for test in tests:
            if isinstance(test, ScriptTest):
                yield _run_script(sandbox, test, config)
            elif isinstance(test, CallTest):
                yield _run_call(sandbox, test, config)
            else:
                yield _run_check(sandbox, checker, test, config)


def _run_script(sandbox: Sandbox, test: ScriptTest, config: CodeRewardConfig) -> str:
    with memory_file(test.stdin.encode(errors="replace")) as stdin, memory_file() as stdout:
        sandbox.start_test([stdin, stdout])
        ending = sandbox.wait()
        limit = config.output_mb << 20
        output = os.pread(stdout, limit, 0)
    if len(output) == limit:
        return "output"
    if ending != "exit 0":
        return _failure(ending)
    printed = output.decode(errors="replace")
    return _verdict(outputs_agree(printed, test.expected, config.float_tolerance))


def _run_call(sandbox: Sandbox, test: CallTest, config: CodeRewardConfig) -> str:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            sandbox.start_test([theirs.fileno()])
        try:
            value = _call(Names(Tests(ours), others={}), test)
        except Exception:  # the program may raise anything, or send something else than an answer
            value = None
            answered = False
        else:
            answered = True
    ending = sandbox.wait()
    if ending != "exit 0" or not answered:
        return _failure(ending)
    return _verdict(
        any(values_agree(value, expected, config.float_tolerance) for expected in test.accepted)
    )


def _call(names: Names, test: CallTest) -> object:
    try:
        owner = names["Solution"]()
    except KeyError:
        return names[test.function](*test.arguments)
    return getattr(owner, test.function)(*test.arguments)


def _run_check(
    sandbox: Sandbox, checker: Sandbox, test: CheckTest, config: CodeRewardConfig
) -> str:
    program_side, test_side = socket.socketpair()
    with program_side, test_side:
        sandbox.start_test([program_side.fileno()])
        checker.load("check", test.code)
        checker.start_test([test_side.fileno()])
    verdict, ending = checker.wait(), sandbox.wait()
    return _verdict(verdict == "exit 0") if ending == "exit 0" else _failure(ending)


def _failure(ending: str) -> str:
    if ending.startswith("exit"):
        return "error"
    return ending if ending in ("time", "memory") else "ended"


def _verdict(right: bool) -> str:
    return "passed" if right else "wrong"
