"""Right programs run in the sandbox as they do elsewhere."""

import json

import pytest

from klear_megatron.rewards import code_reward
from tests.rewards.test_code import respond

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
