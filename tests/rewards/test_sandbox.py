"""Programs that attack their host or each other, and the limits of the real sandbox."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from klear_megatron.errors import UserError
from klear_megatron.rewards import CustomRewardConfig, Job, RewardConfig, RewardPool
from klear_megatron.rewards.sandbox import Sandbox, SandboxError, bubblewrap, check_sandbox
from tests.rewards.hostile import (
    CONFIG,
    SUM,
    SUM_CALLS,
    grade,
    outcomes,
    respond,
    sandboxed_processes,
)
from tests.rewards.test_pool import meet

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
    sleeper = respond("import os, time\nos.setsid()\ntime.sleep(1e6)")
    script = f"from klear_megatron.rewards import code_reward\ncode_reward({sleeper!r}, {SUM!r})"
    with subprocess.Popen([sys.executable, "-c", script]) as grader:
        before = set(sandboxed_processes())
        deadline = time.monotonic() + 20
        while len(set(sandboxed_processes()) - before) < 3:  # bwrap, the first process, the program
            assert time.monotonic() < deadline
            time.sleep(0.05)
        grader.kill()


def test_a_sandbox_that_is_killed_as_it_starts_is_started_again(monkeypatch, tmp_path):
    check_sandbox(CONFIG)
    start, killed = Sandbox._start, []
    # A kill from here may come too late, when bubblewrap has a child that works without it.
    (tmp_path / "bwrap").write_text("#!/bin/sh\nkill -KILL $$\n")
    (tmp_path / "bwrap").chmod(0o755)

    def start_and_kill(self, control, messages):
        if len(killed) == 2:
            return start(self, control, messages)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            killed.append(start(self, control, messages))
        return killed[-1]

    monkeypatch.setattr(Sandbox, "_start", start_and_kill)
    assert outcomes(grade("print(sum(map(int, input().split())))")) == {"passed": 1}
    assert [process.wait() for process in killed] == [-signal.SIGKILL] * 2


def test_what_a_killed_bubblewrap_leaves_behind_is_ended(monkeypatch, tmp_path):
    seconds = f"9{os.getpid()}"
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\nsleep {seconds} &\nkill -KILL $$\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="ended 3 times before its first test"):
        Sandbox(CONFIG, wall_limit_s=1).__enter__()
    started = psutil.process_iter(["cmdline"])
    left = [one for one in started if seconds in (one.info["cmdline"] or [])]
    assert not psutil.wait_procs(left, timeout=5)[1]


def test_all_of_a_programs_time_is_limited():
    tests = json.dumps({"inputs": [""] * 50, "outputs": ["x"] * 50})
    config = CONFIG.model_copy(update={"test_wall_limit_s": 1.0, "wall_limit_s": 3.0})
    check_sandbox(config)  # which starts one of its own, once for a config
    start = time.monotonic()
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
