"""What counts as a right program: its extraction, the forms of tests, and the score."""

import base64
import json
import pickle
import textwrap
import zlib

import pytest

from klear_megatron.errors import UserError
from klear_megatron.rewards import (
    CodeRewardConfig,
    Job,
    MathRewardConfig,
    RewardConfig,
    RewardPool,
    check_ground_truths,
    code_reward,
    math_reward,
)
from klear_megatron.rewards.code import extract_program
from klear_megatron.rewards.code_tests import CallTest, CheckTest, ScriptTest, parse_tests


def respond(program):
    return f"<think>Well.</think>\nHere:\n```python\n{textwrap.dedent(program)}\n```\nDone."


def compress(cases):
    """As the public LiveCodeBench files have their private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


STDIN_CASES = [
    {"input": "2 3\n", "output": "5\n", "testtype": "stdin"},
    {"input": "3 4\n", "output": "7", "testtype": "stdin"},
]
CALL_CASES = [
    {"input": "2\n3", "output": "5", "testtype": "functional"},
    {"input": "3\n4", "output": "7", "testtype": "functional"},
]
ADD_NUMBERS = "print(sum(map(int, input().split())))"
ADD = "def add(a: int, b: int) -> List[int]:\n    return a + b"
ADD_METHOD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b"
FUNCTION = json.dumps({"func_name": "add"})

FORMATS = {
    "stdin texts": ({"inputs": ["2 3\n", "3 4"], "outputs": ["5\n", "7"]}, ADD_NUMBERS),
    "stdin lines": (
        {"inputs": [["2", "3"]], "outputs": [["5", "6"]]},
        "a, b = int(input()), int(input())\nprint(a + b)\nprint(a * b)",
    ),
    "fn_name": ({"fn_name": "add", "inputs": [[2, 3], [3, 4]], "outputs": [5, [7]]}, ADD),
    "fn_name of a Solution": (
        {"fn_name": "add", "inputs": ["2\n3"], "outputs": ["5"]},
        ADD_METHOD,
    ),
    "case by case": (STDIN_CASES, ADD_NUMBERS),
    "calls case by case": (
        [{**case, "metadata": {"func_name": "add"}} for case in CALL_CASES],
        ADD,
    ),
    "assertions": (["assert add(2, 3) == 5", "assert add(b=3, a=4) == 7"], ADD),
    "functional": (
        {"functional": "def check(f):\n    assert all(f(i, 1) == i + 1 for i in (1,))\ncheck(add)"},
        ADD,
    ),
    "functional list": ({"functional": ["assert add(2, 3) == 5", "assert add(3, 4) == 7"]}, ADD),
    "LeetCodeDataset": (
        {
            "task_id": "add-two",
            "question_id": 1,
            "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
            "entry_point": "Solution().add",
            "test": "def check(candidate):\n    assert candidate(a = 2,b = 3) == 5\n"
            "    assert candidate(a = 3,b = 4) == 7\n",
            "input_output": [{"input": "a = 2, b = 3", "output": "5"}],
        },
        ADD_METHOD,
    ),
    "HumanEval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def add(a, b):\n",
            "entry_point": "add",
            "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n",
        },
        ADD,
    ),
    "TACO": (
        {
            "question": "Add.",
            "starter_code": "",
            "input_output": '{"inputs": ["2 3\\n", "3 4\\n"], "outputs": ["5\\n", "7\\n"]}',
            "difficulty": "EASY",
            "time_limit": "2.0 seconds",
        },
        ADD_NUMBERS,
    ),
    "APPS calls": (
        {
            "problem_id": 1,
            "starter_code": "def add(a, b):\n\t",
            "input_output": '{"fn_name": "add", "inputs": [[2, 3], [3, 4]], "outputs": [[5], 7]}',
        },
        ADD,
    ),
    "APPS calls with dicts": (
        {
            "input_output": {
                "fn_name": "add",
                "inputs": [[{"1": 2}, {"1": 3}]],
                "outputs": [{"1": 5}],
            }
        },
        "def add(x, y):\n    a, b = x[1], y[1]\n    return {1: a + b}",
    ),
    "Codeforces": (
        {
            "id": "1/A",
            "contest_name": "Codeforces Round 1",
            "input_mode": "stdio",
            "interaction_format": None,
            "generated_checker": None,
            "examples": [{"input": "2 3", "output": "5"}],
            "official_tests": [
                {"input": "2 3\n", "output": "5\n"},
                {"input": "3 4\n", "output": "7\n"},
            ],
            "official_tests_complete": True,
        },
        ADD_NUMBERS,
    ),
    "LiveCodeBench stdin": (
        {
            "public_test_cases": json.dumps(STDIN_CASES[:1]),
            "private_test_cases": compress(STDIN_CASES[1:]),
            "metadata": "{}",
        },
        ADD_NUMBERS,
    ),
    "LiveCodeBench calls": (
        {
            "public_test_cases": json.dumps(CALL_CASES[:1]),
            "private_test_cases": compress(CALL_CASES[1:]),
            "metadata": FUNCTION,
        },
        ADD_METHOD,
    ),
}


@pytest.mark.parametrize(("tests", "program"), FORMATS.values(), ids=FORMATS)
def test_each_format_of_tests_passes_right_programs_and_fails_wrong_ones(tests, program):
    ground_truth = json.dumps(tests)
    right = code_reward(respond(program), ground_truth)
    assert right.correct
    assert right.score == 1
    assert right.parts["tests/passed"] == 1
    wrong = code_reward(respond(program.replace("+ b", "- b").replace("sum", "max")), ground_truth)
    assert not wrong.correct
    assert wrong.score == 0


def test_ground_truth_may_be_a_list_of_assertions():
    assert code_reward(respond(ADD), ["assert add(2, 3) == 5"]).correct


def test_authors_rows_and_benchmarks_named_after_them_are_graded_as_code():
    jobs = [
        Job(source, respond(ADD_NUMBERS), json.dumps({"inputs": ["2 3"], "outputs": ["5"]}))
        for source in ("coder1_longcot", "coder1_longcot_lcbv5")
    ]
    with RewardPool(RewardConfig(workers=1)) as pool:
        assert [reward.correct for reward in pool.grade(jobs)] == [True, True]


SIXTEEN = json.dumps(
    {"inputs": [str(i) for i in range(16)], "outputs": ["ok" if i < 4 else "no" for i in range(16)]}
)


def test_soft_reward_is_the_share_of_passed_tests_and_hard_is_all_or_nothing():
    four_of_16 = respond("print('ok')")
    assert code_reward(four_of_16, SIXTEEN).score == 0.25
    hard = CodeRewardConfig(mode="hard", correct=2.0, wrong=-3.0, format_penalty=0.5)
    assert code_reward(four_of_16, SIXTEEN, hard).score == -3
    assert code_reward(four_of_16.removeprefix("<think>"), SIXTEEN, hard).score == -3.5
    all_right = respond("print('ok' if int(input()) < 4 else 'no')")
    assert code_reward(all_right, SIXTEEN, hard).score == 2


def test_a_sample_of_the_tests_is_the_same_for_every_response():
    numbers = [str(i) for i in range(64)]
    tests = json.dumps({"inputs": numbers, "outputs": numbers})
    even = respond("n = int(input())\nprint(n if n % 2 == 0 else -1)")
    odd = respond("n = int(input())\nprint(n if n % 2 else -1)")
    sampled = CodeRewardConfig(max_tests=16, test_seed=1)
    scores = [code_reward(program, tests, sampled).score for program in (even, odd)]
    assert sum(scores) == 1
    assert all(score * 16 == int(score * 16) for score in scores)
    by_seed = {
        code_reward(even, tests, CodeRewardConfig(max_tests=16, test_seed=seed)).score
        for seed in range(5)
    }
    assert len(by_seed) > 1
    assert code_reward(even, tests, CodeRewardConfig(max_tests=100)).score == 0.5


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think></think>{}", 1.0),
        ("Well. <think></think>{}", 1.0),
        ("<think><think></think>{}", 1.0),
        ("</think>{}", -2.0),
        ("<think>{}", -0.5),
        ("{}", -0.5),
    ],
)
def test_format_can_be_scored_as_the_authors_do(response, score):
    program = response.format("\n```python\nprint('ok' if int(input()) < 4 else 'no')\n```")
    assert code_reward(program, SIXTEEN, CodeRewardConfig(format="authors")).score == score
    answer = response.format(r"\boxed{4}")
    assert math_reward(answer, "4", MathRewardConfig(format="authors")).score == score


@pytest.mark.parametrize(
    "response",
    [
        "",
        "<think></think>",
        "<think></think> print('ok')",
        "<think>\n```python\nprint('ok')\n```\n</think>",
        "```python\nprint('ok')\n```",
        "<think></think>\n```python\nprint('ok')",
        "<think></think>\n```cpp\nint main() {}\n```",
    ],
)
def test_answer_without_a_program_passes_no_test(response):
    reward = code_reward(response, SIXTEEN)
    assert reward.score == (
        0 if response.startswith("<think>") and "</think>" in response else -0.5
    )
    assert not reward.correct
    assert not any(reward.parts.values())


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("```Python3\na\n\nb\n```\n", "a\n\nb"),
        ("```py\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```\nIt prints:\n```\n5\n```", "a"),
        ("```python\na\n```\n```text\n5\n```", "a"),
        ("  ```python\n  a\n  ```", "  a"),
        ("```python\ns = '''\n``` no end\n'''\n```", "s = '''\n``` no end\n'''"),
        ("```python\na\n```\n```python\nb", "a"),
        ("```python\n```", ""),
        ("``` python\na\n```", "a"),
        ("`a`", None),
        ("```python a ```", None),
        ("x" * 5_000_000, None),
        ("```\n" * 1_000_001, ""),
    ],
)
def test_last_fenced_program_is_extracted(answer, program):
    assert extract_program(answer) == program


def test_forms_of_tests_mean_what_they_say():
    assert parse_tests(json.dumps(FORMATS["stdin lines"][0])) == [ScriptTest("2\n3", "5\n6")]
    assert parse_tests(json.dumps(FORMATS["fn_name"][0])) == [
        CallTest("add", [2, 3], (5,)),
        CallTest("add", [3, 4], ([7], 7)),
    ]
    assert parse_tests(json.dumps(FORMATS["LiveCodeBench calls"][0])) == [
        CallTest("add", [2, 3], (5,)),
        CallTest("add", [3, 4], (7,)),
    ]
    assert parse_tests(["assert 1"]) == [CheckTest("assert 1")]


class Witness:
    """Its unpickling would be seen."""

    def __reduce__(self):
        return (pytest.fail, ("code in a data file was run",))


def lcb_private(payload):
    return json.dumps({"private_test_cases": base64.b64encode(payload).decode()})


@pytest.mark.parametrize(
    ("ground_truth", "what"),
    [
        ("", "JSONDecodeError"),
        ("4", "neither a list nor an object"),
        ("null", "neither"),
        ("{}", "inputs"),
        ("[]", "no tests"),
        ('{"inputs": [], "outputs": []}', "no tests"),
        ('{"inputs": ["1"], "outputs": []}', "1 inputs, but 0 outputs"),
        ('[{"input": "1"}]', "output"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', "metadata"),
        (json.dumps([CALL_CASES[0], STDIN_CASES[0]]), "some tests call a function"),
        ('{"input_output": ""}', "JSONDecodeError"),
        ('{"input_output": "{}"}', "inputs"),
        ('{"entry_point": "f"}', "test"),
        ('{"official_tests": []}', "no tests"),
        ('{"official_tests": [], "interaction_format": "Ask."}', "an interactive problem"),
        ('{"official_tests": [], "generated_checker": "import sys"}', "generated_checker is not"),
        ('{"official_tests": [], "input_mode": "file"}', "only standard input"),
        ('{"functional": 4}', "neither a text nor a list"),
        ('{"functional": [4]}', "neither a text nor a list"),
        ("[" * 100_000, "Recursion"),
        ('{"private_test_cases": "!"}', "private_test_cases"),
        (lcb_private(b"junk"), "private_test_cases"),
        (lcb_private(zlib.compress(b"junk")), "private_test_cases"),
        (lcb_private(zlib.compress(pickle.dumps(Witness()))), "refused to load"),
        (lcb_private(zlib.compress(pickle.dumps(["x"]))), "a pickled list"),
    ],
)
def test_other_ground_truths_are_refused(ground_truth, what):
    with pytest.raises(UserError, match=rf"reward_model\.ground_truth: .*{what}"):
        code_reward(respond("print(5)"), ground_truth)


def test_malformed_tests_are_found_before_training():
    math = "math_longcot_math_verify", "4"
    check_ground_truths([math, ("coder1_longcot", SIXTEEN)])
    with pytest.raises(UserError, match=r"row 1: reward_model\.ground_truth: not the tests"):
        check_ground_truths([math, ("coder1_longcot_lcbv5", "4")])
    bad = [("coder1_longcot", '{"official_tests": []}')] * 7
    with pytest.raises(
        UserError, match=r"graded: 7\nrow 1: (.*\n)*row 5: .*no tests.*\nand 2 more"
    ):
        check_ground_truths([math, *bad])


def test_interpreter_that_does_not_run_is_refused(tmp_path):
    config = CodeRewardConfig(python=tmp_path / "python")
    with pytest.raises(UserError, match=r"rewards\.code\.python: .*does not run"):
        code_reward(respond("print(5)"), SIXTEEN, config)
