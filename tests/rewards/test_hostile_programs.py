"""Programs that attack their grader or its host, in the real sandbox."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from klear_megatron.errors import UserError
from klear_megatron.rewards import (
    CodeRewardConfig,
    CustomRewardConfig,
    Job,
    RewardConfig,
    RewardPool,
    code_reward,
)
from klear_megatron.rewards.sandbox import bubblewrap, check_sandbox
from tests.rewards.test_pool import meet

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


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(sandboxed_processes())
    yield
    deadline = time.monotonic() + 5
    while left := set(sandboxed_processes()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


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


def blocked(attempt):
    """A program that says whether an attempt failed with an OSError."""
    return (
        "import ctypes, os, signal, socket, sys\nfrom pathlib import Path\n"
        f"def attempt():\n{textwrap.indent(textwrap.dedent(attempt), '    ')}\n"
        "try:\n    attempt()\n    print('done')\n"
        "except (OSError, ValueError):\n    print('blocked')\n"
    )


SYSTEM_CALL = """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.{} == -1:
        raise OSError(ctypes.get_errno())
"""


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "open('/etc/hostname').read()",
        "os.listdir('/home')",
        "os.listdir('/proc/1/root/home')",
        f"open({os.path.abspath(__file__)!r}).read()",
        f"os.listdir({str(Path.cwd())!r})",
        "open('/proc/1/mem', 'rb').read(1)",
        "open('/proc/1/environ', 'rb').read()",
        "open('/tmp/x', 'w')",
        "open('/x', 'w')",
        "open('/dev/x', 'w')",
        "open('/dev/shm/x', 'w')",
        "open('/inside/x', 'w')",
        "open('/proc/sys/kernel/hostname', 'w').write('x')",
        "open('/proc/1/oom_score_adj', 'w').write('-1000')",
        "os.mkdir('/y')",
        "os.chroot('/')",
        "os.setuid(0)",
        "os.kill(os.getppid(), 0) if os.getuid() else os.kill(-5, 0)",
        "os.memfd_create('x')",
        "os.nice(-5)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))",
        SYSTEM_CALL.format("unshare(0x10000000)"),
        SYSTEM_CALL.format("shmget(0, 1 << 30, 0o1600)"),
        SYSTEM_CALL.format("ptrace(16, 1, 0, 0)"),
        SYSTEM_CALL.format("mount(b'none', b'/tmp', b'tmpfs', 0, None)"),
        SYSTEM_CALL.format("syscall(56, 0x10000011, 0, 0, 0, 0)"),
        SYSTEM_CALL.format("syscall(435, 0, 0)"),
        SYSTEM_CALL.format("syscall(425, 1, 0)"),
        "socket.socket(socket.AF_VSOCK)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_TIPC, socket.SOCK_RDM)",
        "socket.socketpair(socket.AF_TIPC, socket.SOCK_SEQPACKET)",
        # Only the low half of the register is the family: the kernel does not look at the other.
        SYSTEM_CALL.format("syscall(41, ctypes.c_ulong((1 << 32) + 16), 3, 0)"),
        "socket.create_connection(('1.1.1.1', 53), timeout=1)",
        "socket.create_connection(('example.com', 80), timeout=1)",
    ],
)
def test_attempt_on_the_host_is_blocked(attempt):
    ground_truth = json.dumps({"inputs": [""], "outputs": ["blocked"]})
    assert outcomes(grade(blocked(attempt), ground_truth)) == {"passed": 1}


def test_only_sockets_of_the_sandboxs_own_network_can_be_made():
    """Of all the families a kernel may know: AF_UNIX, AF_INET and, where it has it, AF_INET6."""
    program = """
        import errno, socket
        made = set()
        for family in range(64):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                try:
                    socket.socket(family, kind).close()
                    made.add(family)
                except OSError as error:
                    if error.errno != errno.EAFNOSUPPORT:
                        made.add(family)
        socket.socketpair()
        print({1, 2} <= made <= {1, 2, 10})
    """
    assert grade(program, json.dumps({"inputs": [""], "outputs": ["True"]})).correct


def test_host_and_other_sandboxes_are_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ground_truth = json.dumps({"inputs": [""], "outputs": ["blocked"]})
        program = blocked(f"socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        assert grade(program, ground_truth).correct
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_processes_see_only_their_own_and_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    program = """
        import os
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        print(pids == {1, os.getpid()}, "SECRET_OF_THE_HOST" in os.environ)
        print(sorted(set(os.listdir("/")) - {"lib", "lib32", "lib64", "usr"}), os.listdir("/tmp"))
    """
    visible = {"dev", "etc", "inside", "proc", "tmp"}
    for folder in bubblewrap.find_interpreter(None).folders:
        visible.add(Path(folder).parts[1])
    expected = f"True False\n{sorted(visible - {'usr'})} []"
    assert grade(program, json.dumps({"inputs": [""], "outputs": [expected]})).correct


def test_background_child_is_gone_when_the_next_test_starts():
    program = """
        import os, time
        number = int(input())
        if number == 1:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.close(0); os.close(1); os.close(2)
                    time.sleep(1e6)
                os._exit(0)
            os.wait()
        print(number + sum(name.isdigit() for name in os.listdir("/proc")))
    """
    tests = {"inputs": ["1", "2"], "outputs": ["4", "4"]}  # beside itself and the first process
    assert outcomes(grade(program, json.dumps(tests))) == {"passed": 1}


def test_tests_of_one_program_share_nothing():
    program = """
        count = 0
        def add(a, b):
            global count
            count += 1
            return a + b + count - 1
    """
    assert grade(program, SUM_CALLS).correct


SLEEPER = respond("import os, time\nos.setsid()\ntime.sleep(1e6)")


def test_bad_programs_do_not_keep_the_pool_from_good_ones(tmp_path):
    config = RewardConfig(
        code=CONFIG.model_copy(update={"wall_limit_s": 5.0}),
        custom=[CustomRewardConfig(function=f"{meet.__module__}:meet", data_sources=["meeting"])],
        workers=2,
    )
    bad = respond("while True: pass")
    good = respond("print(sum(map(int, input().split())))")
    done = {}
    with RewardPool(config) as pool:
        pool.grade([Job("meeting", str(tmp_path), "")] * 2)
        start = time.monotonic()
        jobs = [Job("coder1_longcot", bad, SUM)] + [Job("coder1_longcot", good, SUM)] * 8
        rewards = pool.grade(jobs, lambda i: done.setdefault(i, time.monotonic() - start))
    assert [reward.correct for reward in rewards] == [False] + [True] * 8
    assert rewards[0].timed_out
    assert max(done[i] for i in range(1, 9)) < done[0]


def test_programs_end_when_their_grader_is_killed():
    """`nothing_is_left` looks for them afterwards."""
    script = f"from klear_megatron.rewards import code_reward\ncode_reward({SLEEPER!r}, {SUM!r})"
    with subprocess.Popen([sys.executable, "-c", script]) as grader:
        before = set(sandboxed_processes())
        deadline = time.monotonic() + 20
        while len(set(sandboxed_processes()) - before) < 3:  # bwrap, the first process, the program
            assert time.monotonic() < deadline
            time.sleep(0.05)
        grader.kill()


def test_all_of_a_programs_time_is_limited():
    tests = json.dumps({"inputs": [""] * 50, "outputs": ["x"] * 50})
    start = time.monotonic()
    config = CONFIG.model_copy(update={"test_wall_limit_s": 1.0, "wall_limit_s": 3.0})
    reward = grade("import time\ntime.sleep(1e6)", tests, config)
    assert time.monotonic() - start < 3 + 2
    assert outcomes(reward) == {"time": 1}


def test_without_bubblewrap_no_program_is_run(monkeypatch, tmp_path):
    witness = tmp_path / "witness"
    program = f"open({str(witness)!r}, 'w').close()\nprint(sum(map(int, input().split())))"
    monkeypatch.setenv("PATH", str(tmp_path))
    check_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"bwrap.* is not installed.*unsafe"):
        grade(program)
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces for you >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(UserError, match=r"no namespaces for you.*unsafe"):
        grade(program)
    with RewardPool(RewardConfig(code=CONFIG)) as pool, pytest.raises(UserError, match="unsafe"):
        pool.grade([Job("coder1_longcot", respond(program), SUM)])
    assert not witness.exists()
    assert grade(program, config=CONFIG.model_copy(update={"sandbox": "unsafe"})).correct
    assert witness.exists()


def test_unsafe_still_ends_what_does_not_end():
    config = CONFIG.model_copy(update={"sandbox": "unsafe", "test_wall_limit_s": 0.5})
    program = "import os\nos.fork()\nos.fork()\nwhile True: pass"
    assert outcomes(grade(program, config=config)) == {"time": 1}


RUN_PROGRAMS = """
import json, sys
from klear_megatron.rewards.code import run_tests
from klear_megatron.rewards.code_tests import ScriptTest
from klear_megatron.rewards.config import CodeRewardConfig

config = CodeRewardConfig(test_wall_limit_s=4, memory_mb=256, processes=16)
for program, expected in json.load(sys.stdin):
    print(*run_tests(program, [ScriptTest("", expected)], config))
"""
COUNT_FORKS = """
import os, time
forks = 0
while forks < 1000:
    try:
        if os.fork() == 0:
            time.sleep(1e6)
        forks += 1
    except OSError:
        break
print(forks < 16)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="is the case of all the other tests")
def test_without_root_a_user_namespace_does_the_same():
    """The sandbox is made in another way where it is not root who starts it."""
    # This environment's own interpreter may be in a folder of root's.
    interpreter = shutil.which("python3", path="/usr/bin")
    if interpreter is None:
        pytest.skip("there is no interpreter that everybody may run")
    programs = [
        (COUNT_FORKS, "True"),
        (blocked("open('/etc/passwd').read()"), "blocked"),
        (blocked("open('/tmp/x', 'w').write('x')"), "blocked"),
        (blocked("os.setuid(0)"), "blocked"),
        (blocked("os.memfd_create('x')"), "blocked"),
        ("x = [0]\nwhile True: x += x", "memory"),
    ]
    done = subprocess.run(
        [interpreter, "-c", RUN_PROGRAMS],
        input=json.dumps(programs),
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"},
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["passed"] * 5 + ["memory"], done.stderr
