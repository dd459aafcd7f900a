"""The first process of a sandbox: runs each test of a program in a process of its own.

`main.py CONTROL_FD LIMITS SEARCH_PATH NAMES` takes orders over the SOCK_SEQPACKET socket
CONTROL_FD, one packet and its file descriptors at a time. LIMITS are the fields of `Limits`, in
order; NAMES, such as "deque=collections.deque re=re", may be used without importing them.

    load KIND   [source]          compile a Python text, for the tests that follow
    test        [stdin, stdout]   run a "script"
                [connection]      serve the names of a "module"; run a "check" against them

Each test is answered by one packet: `exit STATUS`, `time` or `memory`. Nothing here is secret: no
expected output ever enters the sandbox of a program, so a program gains nothing by taking over this
process.
"""

# The bare C modules: `socket` and `signal` would take longer to import than the rest to run.
import _signal
import _socket
import _thread
import gc
import os
import resource
import sys
import time

TYPE_CHECKING = False  # importing `typing` would take longer than a test
if TYPE_CHECKING:
    from collections.abc import Callable

RECURSION_LIMIT = 50_000  # LiveCodeBench's; the stack to match is set before this process starts
THREAD_STACK_BYTES = 8 << 20
MEMORY_EXHAUSTED = 113  # the exit status of a test that ended in a MemoryError
WATCH_INTERVAL_S = 0.05
FIRST_PROCESS = os.getpid() == 1


class Limits:
    def __init__(
        self,
        user: str,
        memory: str,
        processes: str,
        file_size: str,
        test_cpu_s: str,
        test_wall_s: str,
        cpu_s: str,
    ) -> None:
        self.user = int(user)
        self.memory = int(memory)
        self.processes = int(processes)
        self.file_size = int(file_size)
        self.test_cpu_s = float(test_cpu_s)
        self.test_wall_s = float(test_wall_s)
        self.cpu_s = float(cpu_s)

    def next_test_cpu_s(self) -> float:
        """CPU seconds for the next test: what earlier tests have left, up to the limit of one."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return min(self.test_cpu_s, self.cpu_s - used.ru_utime - used.ru_stime)

    def apply(self, cpu_s: float) -> None:
        """Limit the calling process and its children, for good."""
        if os.getuid() == 0 and FIRST_PROCESS:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        sys.setrecursionlimit(RECURSION_LIMIT)
        # Threads would get a stack as large as the main thread's, which counts as memory.
        _thread.stack_size(THREAD_STACK_BYTES)
        limits = {
            resource.RLIMIT_AS: self.memory,
            resource.RLIMIT_CPU: int(cpu_s) + 1,  # in case `wait` does not get to run in time
            resource.RLIMIT_FSIZE: self.file_size,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
        }
        if FIRST_PROCESS:  # elsewhere the other processes of this user would be counted as well
            limits[resource.RLIMIT_NPROC] = self.processes
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))


def main(control_fd: str, *arguments: str) -> None:
    *limit_arguments, search_path, pairs = arguments
    names = dict(pair.split("=") for pair in pairs.split())
    limits = Limits(*limit_arguments)
    sys.path[:] = [os.path.dirname(__file__), *search_path.split(":")]
    control = _socket.socket(fileno=int(control_fd))
    # For compiling, which happens in this process.
    resource.setrlimit(resource.RLIMIT_CPU, (int(limits.cpu_s) + 1,) * 2)
    control.send(b"ready")
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGCHLD})
    runner = None
    while True:
        command, fds = receive(control)
        if command[0] == "load":
            runner = load(command[1], read_file(fds[0]), names)
            gc.freeze()
        elif runner is None:
            control.send(b"exit 1")
        elif (cpu_s := limits.next_test_cpu_s()) <= 0:
            control.send(b"time")
        else:
            child = os.fork()
            if child == 0:
                control.close()
                prepare_test(limits, cpu_s)
                try:
                    return runner(fds)  # the interpreter reports any other exception
                except MemoryError:
                    os._exit(MEMORY_EXHAUSTED)
            control.send(wait(child, limits, cpu_s).encode())
        for fd in fds:
            os.close(fd)


def receive(control: _socket.socket) -> tuple[list[str], list[int]]:
    packet, ancillary, _, _ = control.recvmsg(100, 256)
    if not packet:
        sys.exit(0)
    fds = [
        int.from_bytes(data[start : start + 4], sys.byteorder)
        for _, _, data in ancillary
        for start in range(0, len(data), 4)
    ]
    return packet.decode().split(), fds


def read_file(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode()


def load(kind: str, source: str, paths: "dict[str, str]") -> "Callable[[list[int]], None] | None":
    """A function that runs a test of this text; None if the text is not a program."""
    try:
        code = compile(source, "program.py", "exec")
    except Exception:
        return None
    # Each kind imports what it needs: `json`, of no use to scripts, takes longer than a test.
    from scripts import import_names, run

    if kind == "script":
        names = import_names(source, paths)
        return lambda fds: run(code, names, *fds)
    import leetcode

    names = import_names(source, paths | leetcode.NAMES)
    if kind == "check":
        from checking import check

        return lambda fds: check(code, names, _socket.socket(fileno=fds[0]))
    from serving import serve

    return lambda fds: serve(code, names, _socket.socket(fileno=fds[0]))


def prepare_test(limits: Limits, cpu_s: float) -> None:
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGCHLD})
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)  # too much output is the end, not an OSError
    _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)  # those that grade ignore it
    del sys.path[0]
    if not FIRST_PROCESS:
        os.setsid()  # so that its children can be found, and ended, together
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    limits.apply(cpu_s)


def wait(child: int, limits: Limits, cpu_limit_s: float) -> str:
    """Wait until a test ends or reaches a limit, then kill everything that it started."""
    deadline = time.monotonic() + limits.test_wall_s
    verdict = ""
    while not verdict:
        left = deadline - time.monotonic()
        _signal.sigtimedwait({_signal.SIGCHLD}, max(0.0, min(left, WATCH_INTERVAL_S)))
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            verdict = "memory" if code == MEMORY_EXHAUSTED else f"exit {code}"
        else:
            cpu_s, resident_bytes = usage(child)
            if left <= 0 or cpu_s > cpu_limit_s:
                verdict = "time"
            elif resident_bytes > limits.memory:
                verdict = "memory"
    kill_all(child)
    return verdict


def usage(child: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a test: the sum over the sandbox's other processes.

    Without a sandbox, only the test's first process and the children it has waited for count.
    """
    ticks = pages = 0
    for pid in os.listdir("/proc") if FIRST_PROCESS else [str(child)]:
        if pid.isdigit() and pid != "1":
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()  # all after pid and name
            except OSError:
                continue  # it has just ended
            ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
            pages += int(fields[21])  # rss
    return ticks / os.sysconf("SC_CLK_TCK"), pages * resource.getpagesize()


def kill_all(child: int) -> None:
    try:
        if FIRST_PROCESS:
            os.kill(-1, _signal.SIGKILL)  # all at once: not even a fork bomb gets away
        else:
            os.killpg(child, _signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of them had ended
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
