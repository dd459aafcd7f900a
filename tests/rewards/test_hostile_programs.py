"""Programs that want to pass without being right, or to keep their grader, in the real sandbox."""

import json
import secrets
import time

import pytest

from tests.rewards.hostile import (
    CONFIG,
    SUM_CALLS,
    SUM_CHECKS,
    grade,
    outcomes,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

IGNORE_SIGNALS = """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
"""


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        pytest.param("while True: pass", "time", id="endless loop"),
        pytest.param(IGNORE_SIGNALS + "    while True: pass", "time", id="ignores all signals"),
        pytest.param("import time\ntime.sleep(1e6)", "time", id="sleep"),
        pytest.param("9 ** 9 ** 9", "time", id="uninterruptible"),
        pytest.param(
            """
            import os
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
            """,
            "time",
            id="fork bomb",
        ),
        pytest.param(
            """
            import threading, time
            while True:
                try:
                    threading.Thread(target=time.sleep, args=[1e6]).start()
                except RuntimeError:
                    pass
            """,
            None,
            id="thread bomb",
        ),
        pytest.param("x = bytearray(1 << 40)", "memory", id="memory at once"),
        pytest.param("x = [0]\nwhile True: x += x", "memory", id="memory bomb"),
        pytest.param(
            """
            import os, time
            for _ in range(8):
                if os.fork() == 0:
                    break
            x = bytearray(100 << 20)
            time.sleep(1e6)
            """,
            "memory",
            id="memory of many processes",
        ),
        pytest.param("while True: print('5' * 1000)", "output", id="endless output"),
        pytest.param(
            """
            import os
            while True:
                try:
                    os.write(1, b'5' * 1000)
                except OSError:
                    pass
            """,
            "output",
            id="endless output in spite of errors",
        ),
        pytest.param(
            "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
            None,
            id="deep recursion",
        ),
        pytest.param("f = lambda: f()\nf()", "error", id="recursion"),
        pytest.param(
            "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\n"
            "repr(x)",
            None,
            id="overflows the C stack",
        ),
        pytest.param("import os\nos.kill(os.getpid(), 9)", "error", id="kills itself"),
        pytest.param("import ctypes\nctypes.string_at(0)", "error", id="segfault"),
        pytest.param("import sys\nsys.exit(0)", "wrong", id="exits with 0"),
        pytest.param("import os\nos._exit(0)", "wrong", id="exits with 0 at once"),
        pytest.param("print(5); print(7); print(9)", "wrong", id="prints all guesses"),
        pytest.param("raise SystemExit(3)", "error", id="exits with 3"),
        pytest.param("(" * 100_000, "error", id="cannot be parsed"),
        pytest.param("\0", "error", id="null byte"),
        pytest.param("print('\\ud800')", "error", id="surrogate"),
        pytest.param("import os\nos.close(1)\nprint(5)", "error", id="closes its output"),
        pytest.param(
            "import atexit, time\natexit.register(time.sleep, 1e6)", "time", id="sleeps at exit"
        ),
        pytest.param(
            """
            import os, signal
            for pid in (os.getppid(), 1, -1):
                for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
                    try:
                        os.kill(pid, number)
                    except OSError:
                        pass
            print(6)
            """,
            "wrong",
            id="kills its parent",
        ),
    ],
)
def test_hostile_script_passes_nothing_and_ends_in_time(program, outcome):
    seconds = 0.7 if outcome in ("time", None) else CONFIG.test_wall_limit_s
    config = CONFIG.model_copy(update={"test_wall_limit_s": seconds})
    start = time.monotonic()
    reward = grade(program, config=config)
    assert time.monotonic() - start < CONFIG.wall_limit_s + 2
    assert not reward.correct
    assert reward.score == 0
    assert reward.timed_out == (outcomes(reward).get("time", 0) > 0)
    if outcome is not None:
        assert outcomes(reward) == {outcome: 1}


def test_guess_passes_only_the_tests_it_is_right_about():
    reward = grade("print(5)")
    assert outcomes(reward) == {"passed": 0.5, "wrong": 0.5}
    assert reward.score == 0.5
    assert not reward.correct


ALWAYS_EQUAL = """
    class Anything(int):
        def __eq__(self, other): return True
        def __ne__(self, other): return False
        def __lt__(self, other): return True
        def __bool__(self): return True
        def __hash__(self): return 5
        def __getattr__(self, name): return self
        def __call__(self, *args): return self
"""


@pytest.mark.parametrize("ground_truth", [SUM_CALLS, SUM_CHECKS], ids=["calls", "checks"])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(ALWAYS_EQUAL + "    def add(a, b): return Anything(0)", id="equals anything"),
        pytest.param(ALWAYS_EQUAL + "    add = Anything()", id="equals anything itself"),
        pytest.param(
            ALWAYS_EQUAL.replace("(int)", "") + "    def add(a, b): return Anything()", id="object"
        ),
        pytest.param(
            """
            import builtins, json, operator, sys, unittest
            class Agreeable:
                def __eq__(self, other): return True
            for module in list(sys.modules.values()):
                for name in ("check", "values_agree", "_call", "_verdict", "AssertionError"):
                    if hasattr(module, name):
                        setattr(module, name, lambda *args: True)
            builtins.AssertionError = type("Never", (Exception,), {})
            builtins.len = builtins.all = operator.eq = json.dumps = lambda *args: 5
            def add(a, b): return Agreeable()
            """,
            id="patches the comparison",
        ),
        pytest.param("import os\nos._exit(0)", id="exits at once"),
        pytest.param("def add(a, b): import os; os._exit(0)", id="exits when called"),
        pytest.param("def add(a, b): raise SystemExit(0)", id="raises SystemExit"),
        pytest.param("def add(a, b): raise AssertionError", id="raises"),
        pytest.param("def add(a, b): return None", id="returns nothing"),
        pytest.param("def add(a, b): return lambda: 5", id="returns a function"),
        pytest.param("def add(a, b): return 'x' * (40 << 20)", id="returns too much"),
        pytest.param(
            "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
            id="returns a deep list",
        ),
        pytest.param("def add(a, b):\n    while True: pass", id="does not return"),
        pytest.param(
            """
            import os
            for fd in range(3, 64):
                for length in (2, 1 << 31):
                    try:
                        os.write(fd, length.to_bytes(4, "big") + b"{}")
                    except OSError:
                        pass
            def add(a, b): return 6
            """,
            id="talks out of turn",
        ),
        pytest.param(
            """
            import gc, sys
            def add(a, b):
                frame = sys._getframe()
                while frame:
                    for value in [*frame.f_locals.values()]:
                        if isinstance(value, list):
                            value.clear()
                        elif isinstance(value, dict):
                            value.update(expected=0, accepted=0, value=0)
                    frame = frame.f_back
                return 0
            """,
            id="changes its callers",
        ),
    ],
)
def test_hostile_module_passes_nothing(program, ground_truth):
    reward = grade(program, ground_truth, CONFIG.model_copy(update={"test_wall_limit_s": 1.5}))
    assert not reward.correct
    assert reward.parts["tests/passed"] == 0


AGREES_WITH_ALL = """
    yes = lambda self, *args: True
    names = "eq ne lt le gt ge bool contains instancecheck"
    members = {f"__{name}__": yes for name in names.split()}
    for name in "add radd sub rsub mul rmul truediv rtruediv abs neg float index round".split():
        members[f"__{name}__"] = lambda self, *args: self
    members |= {"__hash__": lambda self: 5, "__len__": lambda self: 5, "__str__": lambda self: "x"}
    members |= {"__getattr__": lambda self, name: self, "__call__": lambda self, *args: self}
"""
CHECKS_OF_A_SUM = [
    "assert add(2, 3) == 5",
    "assert 5 == add(2, 3)",
    "assert not add(2, 3) != 5",
    "assert abs(add(2, 3) - 5) < 1e-9",
    "assert 4 < add(2, 3) < 6",
    "assert math.isclose(add(2, 3), 5)",
    "assert isclose(add(2, 3), 5)",
    "assert add(2, 3) in (5,) and 5 in [add(2, 3)]",
    "assert {add(2, 3)} == {5}",
    "assert [add(2, 3)] == [5] and {'a': add(2, 3)} == {'a': 5}",
    "assert Counter([add(2, 3)]) == Counter([5])",
    "assert add(2, 3) < inf and add(2, 3) == 5",
    "assert isinstance(add(2, 3), int) and add(2, 3) == 5",
    "assert is_same_list(add(2, 3), list_node([5]))",
    "assert is_same_tree(add(2, 3), tree_node([5]))",
]


@pytest.mark.parametrize("base", ["object", "int", "str", "list", "tuple"])
def test_object_that_agrees_with_everything_is_equal_to_no_data(base):
    program = (
        AGREES_WITH_ALL
        + f"""
    class Anything({base}): pass
    for name, member in members.items():
        setattr(Anything, name, member)
    def add(a, b): return Anything()
    inf = isclose = Counter = math = is_same_list = is_same_tree = list_node = tree_node = add
    ListNode = TreeNode = Anything
    """
    )
    assert grade(program, ["add(2, 3)"]).correct
    reward = grade(program, CHECKS_OF_A_SUM, CONFIG.model_copy(update={"wall_limit_s": 60.0}))
    assert reward.parts["tests/passed"] == 0


MESSAGES = [
    {"value": None, "operands": []},
    {"error": {"classes": [["SystemExit", None]], "args": [0], "object": 0}},
    {"error": {"classes": [["SystemExit", 1], ["SystemExit", None]], "args": [0], "object": 0}},
    {"error": {"classes": [["KeyboardInterrupt", None]], "args": [], "object": 0}},
    {"error": {"classes": [], "args": None, "object": None}},
    {"error": "SystemExit"},
    {"do": "call", "function": 0, "with": [[], {}]},
    {"do": "call", "function": -1, "with": {"tuple": [[0], {}]}},
    {"value": {"like": [0, {"list": [1]}]}},
    {"value": {"nodes": []}},
    {"value": {"exception": [["SystemExit", None]]}},
    {"value": {"object": {"list": []}}},
    [],
    None,
]


@pytest.mark.parametrize("message", MESSAGES, ids=str)
def test_forged_answer_ends_no_test_well(message):
    program = f"""
    import json, os
    data = json.dumps({message!r}).encode()
    def add(a, b):
        for fd in range(3, 64):
            try:
                os.write(fd, len(data).to_bytes(4, "big") + data)
            except OSError:
                pass
        os._exit(0)
    """
    checks = ["assert add(2, 3) == 5", "assert add(2, (lambda x: x)) == 5"]
    assert grade(program, checks).parts["tests/passed"] == 0


TOKEN = "token" + secrets.token_hex(16)


@pytest.mark.parametrize(
    "ground_truth",
    [
        json.dumps({"inputs": ["2 3"], "outputs": [TOKEN]}),
        json.dumps({"inputs": [[2, 3]], "outputs": [TOKEN], "fn_name": "add"}),
        [f"assert add(2, 3) == {TOKEN!r}"],
    ],
    ids=["script", "calls", "checks"],
)
def test_expected_outputs_are_nowhere_to_be_found(ground_truth):
    """It reads all memory and files it can, and answers with what looks like the expected text."""
    program = """
        import os, re
        pattern = re.compile(rb"token[0-9a-f]{32}")
        def look():
            for folder, _, names in os.walk("/"):
                if folder.startswith(("/usr", "/lib", "/root", "/sys")):
                    continue
                for name in names:
                    path = os.path.join(folder, name)
                    if name in ("kmsg", "trace_pipe", "tty") or os.path.getsize(path) > 10**8:
                        continue
                    try:
                        with open(path, "rb") as file:
                            yield from pattern.findall(file.read(10**6))
                    except OSError:
                        pass
        def memory(pid):
            try:
                with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
                    for line in maps:
                        start, end = (int(x, 16) for x in line.split()[0].split("-"))
                        try:
                            mem.seek(start)
                            yield from pattern.findall(mem.read(end - start))
                        except (OSError, ValueError, OverflowError):
                            pass
            except OSError:
                pass
        def add(a, b):
            for pid in ("self", "1"):
                for found in memory(pid):
                    return found.decode()
            return "none"
        if __name__ == "__main__":
            print(add(0, 0))
    """
    reward = grade(program, ground_truth)
    assert outcomes(reward) == {"wrong": 1}
