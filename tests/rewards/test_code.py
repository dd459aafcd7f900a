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
from klear_megatron.rewards.comparison import outputs_agree, values_agree


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


@pytest.mark.parametrize(
    ("printed", "expected", "agree"),
    [
        ("5", "5\n", True),
        ("5 \n", "5", True),
        ("\n\n 1  2\t3 \r\n4\n", "1 2 3\n4", True),
        ("1 2 3", "1\n2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("", "0", False),
        ("YES", "Yes", False),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.3333", False),
        ("1e-7", "0.0", True),
        ("1e-7", "0", False),
        ("2.0", "2", True),
        ("2.0000001", "2", False),
        ("123456800.0", "123456789", False),
        ("1.23456789e8", "123456789", True),
        ("123456788.9", "123456789.0", True),
        ("YES  NO", "YES NO", True),
        ("5", "5.0000000001", True),
        ("007", "7", True),
        ("1000000007", "1000000008", False),
        ("1" + "0" * 400, "1" + "0" * 399 + "1", False),
        ("1" + "0" * 400 + ".5", "1" + "0" * 400, False),
        ("nan", "nan", True),
        ("nan", "1.5", False),
        ("inf", "1e999", False),
        ("-0", "0", True),
        ("a 0.1", "b 0.1", False),
        ("[1, 2]", "[1,2]", False),
    ],
)
def test_outputs_are_compared_by_lines_words_and_numbers(printed, expected, agree):
    assert outputs_agree(printed, expected, 1e-6) is agree


@pytest.mark.parametrize(
    ("printed", "expected", "agree"),
    [
        ("2.50", "2.5", True),
        ("0.3333333", "0.33333333333", False),
        ("2.0 3", "2 3.0", True),
        (" 1  2 \n3", "1 2\n3 ", True),
        ("YES  NO", "YES NO", False),
        ("x 2.0", "x 2", False),
        ("x 2", "x 2", True),
        ("nan 1", "nan 1.0", False),
        ("snan 1", "snan 1.0", False),
        ("Infinity", "inf", True),
        ("1_000", "1000", True),
        ("1\n\n2", "1\n2", False),
        ("", "0", False),
    ],
)
def test_without_tolerance_lines_are_the_same_text_or_the_same_decimals(printed, expected, agree):
    assert outputs_agree(printed, expected, 0) is agree


@pytest.mark.parametrize(
    ("value", "expected", "agree"),
    [
        ((1, 2), [1, 2], True),
        ([(1, 2)], [[1, 2]], False),
        (0.1 + 0.2, 0.3, False),
        (2.0, 2, True),
        (True, 1, True),
        ({1: 2}, {"1": 2}, False),
    ],
)
def test_without_tolerance_values_have_to_be_equal(value, expected, agree):
    assert values_agree(value, expected, 0) is agree


@pytest.mark.parametrize(
    ("value", "expected", "agree"),
    [
        ((1, (2, 3)), [1, [2, 3]], True),
        ([1, 2], [2, 1], False),
        ([0.1 + 0.2], [0.3], True),
        (10**9 + 7, 10**9 + 8, False),
        (10**400, 0.5, False),
        (123456800.0, 123456789, False),
        (2.0000001, 2.0, True),
        (2.0000001, 2, False),
        (2.0, 2, True),
        ("5", 5, False),
        ({1: 2.0}, {"1": 2}, True),
        ({1: 2}, {"1": 2, "3": 4}, False),
        (True, True, True),
        (None, False, False),
        ([], None, False),
        (float("nan"), 1.0, False),
    ],
)
def test_returned_values_are_compared_as_data(value, expected, agree):
    assert values_agree(value, expected, 1e-6) is agree


CHECKS = {
    "types are kept": (
        "def f(): return (1, [2], {3}, {4: None}, b'5', 1j, frozenset())",
        "assert f() == (1, [2], {3}, {4: None}, b'5', 1j, frozenset())",
    ),
    "a tuple is no list": ("def f(): return (1,)", "assert f() != [1]"),
    "arguments changed in place": (
        "def f(x, y):\n    x.sort()\n    y['a'] = 1",
        "x, y = [3, 1], {}\nassert f(x, y) is None\nassert (x, y) == ([1, 3], {'a': 1})",
    ),
    "exceptions": (
        "def f(): raise KeyError('x')",
        "try:\n    f()\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ),
    "objects": (
        "class A:\n  def __init__(self, n): self.n = n\n  def twice(self): return A(self.n * 2)",
        "assert A(n=4).twice().twice().n == 16",
    ),
    "containers of objects": (
        "class A:\n    def __init__(self, n): self.n = n\ndef f(): return [A(1), A(2)]",
        "assert [a.n for a in f()] == [1, 2]",
    ),
    "constants": ("LIMIT = 3", "assert LIMIT == 3"),
    "tests' own imports and helpers": (
        "def f(x): return x ** 0.5",
        "import math\ndef near(a, b): return math.isclose(a, b)\nassert near(f(2), math.sqrt(2))",
    ),
    "counters and deques": (
        "from collections import Counter, deque\ndef f(): return Counter('aab'), deque([1])",
        "assert f() == (Counter(b=1, a=2), deque([1]))\nassert f()[0]['z'] == 0 and f()[1] != [1]",
    ),
    "isinstance of the program's classes": (
        "class A: pass\nclass B(A): pass\ndef f(): return B()",
        "assert isinstance(f(), A) and isinstance(f(), B) and isinstance(A(), A)\n"
        "assert not isinstance(A(), B) and not isinstance(5, A) and issubclass(type(5), int)",
    ),
    "the program's own exceptions": (
        "class Empty(LookupError):\n"
        "    def __init__(self, code): super().__init__('empty', code); self.code = code\n"
        "class Full(Exception): pass\ndef f(): raise Empty(7)",
        "try:\n    f()\nexcept Full:\n    assert False\nexcept Empty as error:\n"
        "    assert error.code == 7 and error.args == ('empty', 7)\nelse:\n    assert False\n"
        "try:\n    f()\nexcept LookupError:\n    pass",
    ),
    "the text of an exception": (
        "def f(): raise ValueError('no such thing')",
        "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'no such thing'\n"
        "else:\n    assert False",
    ),
    "generators": (
        "def f(n):\n    for i in range(n): yield i * i\ndef g():\n    while True: yield 1",
        "assert list(f(4)) == [0, 1, 4, 9] and sum(f(3)) == 5\nx = g()\nassert next(x) == 1\n"
        "assert [a for a, _ in zip(g(), range(2))] == [1, 1]",
    ),
    "containers of the program's": (
        "class A:\n    def __init__(self): self.items = [5, 6]\n"
        "    def __len__(self): return len(self.items)\n"
        "    def __getitem__(self, i): return self.items[i]\n"
        "    def __setitem__(self, i, x): self.items[i] = x",
        "a = A()\nassert len(a) == 2 and a[1] == 6 and a[:1] == [5] and list(a) == [5, 6]\n"
        "a[0] = 7\nassert a[0] == 7 and 7 in a and 5 not in a and a\n"
        "try:\n    a[2]\nexcept IndexError:\n    pass\nelse:\n    assert False",
    ),
    "equality and order of the program's objects": (
        "class A:\n    def __init__(self, n): self.n = n\n"
        "    def __eq__(self, other): return self.n == other.n\n"
        "    def __lt__(self, other): return self.n < other.n\n"
        "    def __hash__(self): return hash(self.n)\n"
        "    def __add__(self, other): return A(self.n + other.n)\n"
        "    def __repr__(self): return f'A({self.n})'",
        "assert A(1) == A(1) and A(1) != A(2) and A(1) < A(2) and A(1) + A(2) == A(3)\n"
        "assert sorted([A(2), A(1)])[0].n == 1 and len({A(1), A(1)}) == 1 and str(A(4)) == 'A(4)'",
    ),
    "identity": (
        "class A: pass\na = A()\ndef f(): return a",
        "assert f() is f() and f() is a and f() == a and A() != A()",
    ),
    "attributes can be set": (
        "class A: n = 1\n",
        "a = A()\na.n = 5\nassert a.n == 5 and A().n == 1",
    ),
    "functions as arguments": (
        "def f(g, x): return [g(i) for i in x]\ndef twice(g): return lambda x: g(g(x))",
        "assert f(lambda x: x + 1, [1, 2]) == [2, 3] and f(str, [1]) == ['1']\n"
        "def fail(x): raise KeyError(x)\nassert twice(twice(lambda x: x * 2))(1) == 16\n"
        "try:\n    f(fail, [1])\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ),
    "functions that call the program back": (
        "def f(g, n): return g(f, n - 1) if n else 'end'",
        "assert f(lambda g, n: g(lambda h, m: h(None, 0), n), 3) == 'end'",
    ),
    "named tuples and enumerations": (
        "P = namedtuple('P', 'x y')\nimport enum\nclass E(enum.IntEnum): ONE = 1",
        "assert P(1, 2) == (1, 2) and P(1, 2).y == 2 and E.ONE == 1 and E.ONE.name == 'ONE'\n"
        "assert isinstance(P(1, 2), P)",
    ),
    "names without imports": (
        "def f(x): return x * 2",
        "assert f(1) < inf and math.isclose(f(0.5), 1) and isinstance(f([1]), List)\n"
        "assert Counter(f([1])) == {1: 2} and gcd(f(2), 6) == 2",
    ),
    "functions named as those of Python's modules": (
        "def add(a, b): return a + b + 1\ndef search(x): return x",
        "assert add(1, 2) == 4 and search(3) == 3",
    ),
    "linked lists": (
        "class Solution:\n  def f(self, head: Optional[ListNode]) -> Optional[ListNode]:\n"
        "    back = None\n    while head: head.next, back, head = back, head, head.next\n"
        "    return back",
        "assert is_same_list(Solution().f(list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
        "assert not is_same_list(Solution().f(list_node([1, 2, 3])), list_node([3, 2]))\n"
        "assert not is_same_list(Solution().f(list_node([1, 2])), list_node([1, 2]))\n"
        "assert Solution().f(list_node([])) is None\nhead = ListNode(1, ListNode(2))\n"
        "assert Solution().f(head).val == 2 and head.next is None",
    ),
    "the program's own class of linked lists": (
        "class ListNode:\n  def __init__(self, x=None):\n    self.val = x\n    self.next = None\n"
        "def f(head):\n  n = ListNode(0)\n  n.next = head\n"
        "  assert isinstance(head, ListNode)\n  return n",
        "assert is_same_list(f(list_node([1, 2])), list_node([0, 1, 2]))",
    ),
    "linked lists that share nodes or go in a circle": (
        "def f(a, b):\n  seen = set()\n  while a and id(a) not in seen:\n    seen.add(id(a))\n"
        "    a = a.next\n  return a is not None and a is b",
        "head = list_node([1, 2, 3])\nassert not f(head, None)\nhead.next.next.next = head\n"
        "assert not f(head, list_node([1]))",
    ),
    "trees": (
        "class Solution:\n  def f(self, root: Optional[TreeNode]) -> Optional[TreeNode]:\n"
        "    if root: root.left, root.right = self.f(root.right), self.f(root.left)\n"
        "    return root",
        "tree = tree_node([1, 2, 3, None, 4])\n"
        "assert is_same_tree(Solution().f(tree), tree_node([1, 3, 2, None, None, 4]))\n"
        "assert tree.left.val == 3 and not is_same_tree(tree, tree_node([1, 2, 3]))\n"
        "assert Solution().f(tree_node([])) is None",
    ),
    "long lists": (
        "def f(head):\n  n = 0\n  while head: n, head = n + 1, head.next\n  return n",
        "assert f(list_node(range(20_000))) == 20_000",
    ),
}


@pytest.mark.parametrize(("program", "check"), CHECKS.values(), ids=CHECKS)
def test_checks_see_the_programs_values_as_they_are(program, check):
    assert code_reward(respond(program), [check]).correct
    assert not code_reward(respond(program), [check + "\nassert False"]).correct
    assert not code_reward(respond("pass"), [check]).correct


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(sys.stdin.read().strip().upper())",
        "import sys\nfor line in sys.stdin:\n    print(line.strip().upper())",
        "import sys\nsys.stdout.write(sys.stdin.buffer.readline().decode().upper())",
        "def main():\n    print(input().upper())\nif __name__ == '__main__':\n    main()",
        "import threading\nt = threading.Thread(target=lambda: print(input().upper()))\nt.start()",
        "import atexit\natexit.register(lambda: print(input().upper()))",
        "import os\nprint(os.read(0, 100).decode().upper())",
        "print(input().upper())\nexit()",
        "from string import ascii_uppercase\nprint(defaultdict(int) or deque() or input().upper())",
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\n"
        "assert f(50_000) == 50_000\nprint(input().upper())",
        "import multiprocessing\nif __name__ == '__main__':\n"
        "    print(input().upper(), flush=True)\n"
        "    p = multiprocessing.get_context('fork').Process(target=print, args=())\n"
        "    p.start(); p.join()",
    ],
)
def test_programs_run_as_scripts_do(program):
    tests = json.dumps({"inputs": ["straße é日本\n"], "outputs": ["STRASSE É日本"]})
    reward = code_reward(respond(program), tests)
    assert reward.correct, reward


LIVECODEBENCH_MODULES = [
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
]


def livecodebench_names():
    """What each name means there, as "module.name" or "module"."""
    meaning = {}
    for module in [*LIVECODEBENCH_MODULES, "builtins", "typing"]:
        scope = {}
        exec(f"from {module} import *", scope)
        meaning |= {name: f"{module}.{name}" for name in scope if name != "__builtins__"}
    return meaning | {module: module for module in LIVECODEBENCH_MODULES}


def test_every_name_that_livecodebench_imports_is_there_and_is_the_same_thing():
    meaning = livecodebench_names()
    assert len(meaning) > 450
    lines = ["import importlib", "def check(name, value, path):"]
    lines += ["    module, _, attribute = path.rpartition('.')"]
    lines += ["    expected = importlib.import_module(module or attribute)"]
    lines += ["    if value is not (getattr(expected, attribute) if module else expected):"]
    lines += ["        print(name)"]
    # The sandbox replaces two; the module `site`, which it does without, makes the others.
    special = {"exit", "quit", "copyright", "credits", "license", "help"}
    for name, path in meaning.items():
        if name not in special:
            lines += ["try:", f"    check({name!r}, {name}, {path!r})"]
            lines += ["except NameError:", f"    print({name!r})"]
    tests = json.dumps({"inputs": [""], "outputs": [""]})
    assert code_reward(respond("\n".join(lines)), tests).correct


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("re = [2]\ndef split(x): return x\nprint(split(re), 'a b'.split())", "[2] ['a', 'b']"),
        ("def f(Fraction): return Fraction\nprint(f(3), Decimal(2) + 1)", "3 3"),
        ("class A:\n    x: List[int] = [inf]\nprint(A.x)", "[inf]"),
        ("print([count for count in range(3)], [*islice(count(5), 2)])", "[0, 1, 2] [5, 6]"),
        ("print(datetime.date(2020, 1, 1), copy.copy([1]))", "2020-01-01 [1]"),
    ],
)
def test_names_are_provided_only_where_the_program_does_not_define_them(program, printed):
    tests = json.dumps({"inputs": [""], "outputs": [printed]})
    assert code_reward(respond(program), tests).correct


INT_METHOD = """
class A:
    def __init__(self, n): self.n = n
    def __int__(self): return self.n and 1 + int(A(self.n - 1))
def f(n): return int(A(n))
"""
RECURSIVE = {
    "function": ("def f(n): return n and 1 + f(n - 1)", 45_000),
    # Python counts a call that goes through C twice, and it takes more of the stack.
    "cached function": ("@cache\ndef f(n): return n and 1 + f(n - 1)", 24_000),
    "method called from C": (INT_METHOD, 24_000),
}


@pytest.mark.parametrize(("program", "depth"), RECURSIVE.values(), ids=RECURSIVE)
def test_recursion_goes_as_deep_as_in_livecodebench(program, depth):
    script = json.dumps({"inputs": [str(depth)], "outputs": [str(depth)]})
    call = json.dumps({"inputs": [[depth]], "outputs": [depth], "fn_name": "f"})
    assert code_reward(respond(program + "\nprint(f(int(input())))"), script).correct
    assert code_reward(respond(program), call).correct
    assert code_reward(respond(program), [f"assert f({depth}) == {depth}"]).correct


def test_threads_fit_into_the_memory():
    program = (
        "import threading\nbarrier = threading.Barrier(9)\n"
        "for _ in range(8): threading.Thread(target=barrier.wait).start()\n"
        "barrier.wait()\nprint('all')"
    )
    tests = json.dumps({"inputs": [""], "outputs": ["all"]})
    assert code_reward(respond(program), tests).correct


def test_large_inputs_and_outputs_arrive():
    numbers = [str(i) for i in range(300_000)]
    tests = json.dumps({"inputs": ["\n".join(numbers)], "outputs": ["\n".join(numbers)]})
    assert code_reward(respond("import sys\nsys.stdout.write(sys.stdin.read())"), tests).correct


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
