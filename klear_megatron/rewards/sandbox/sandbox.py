"""Runs the tests of one program in one sandbox."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Literal

from klear_megatron.errors import UserError
from klear_megatron.rewards.config import CodeRewardConfig
from klear_megatron.rewards.sandbox.bubblewrap import (
    INSIDE,
    UNSAFE_HINT,
    bubblewrap_command,
    find_interpreter,
)
from klear_megatron.rewards.sandbox.seccomp import seccomp_filter

_STACK_KB = 256 << 10
"""Room in the main thread for the 50,000 calls that the recursion limit allows."""

_STARTS = 3
"""Tries to start a sandbox. One may be killed meanwhile, as for want of memory; no program is in it
yet."""

Kind = Literal["script", "module", "check"]


class SandboxError(RuntimeError):
    """The sandbox itself could not be started; no program is to blame."""


class Sandbox:
    """A context manager: a sandbox that holds one text and runs its tests one after another.

    A text is a "script", which is run once for each test; a "module", whose names are served to
    each test; or a "check", which tests a module. Nothing of one test is left when the next one
    starts. `wall_limit_s` after its start the sandbox and all in it are ended, whatever goes on
    there. The config's other limits are kept by the first process inside.

    Raises:
        SandboxError: it does not start.
        UserError: bubblewrap is not installed.
    """

    def __init__(self, config: CodeRewardConfig, wall_limit_s: float) -> None:
        self._config = config
        self._wall_limit_s = wall_limit_s

    def __enter__(self) -> "Sandbox":
        for _ in range(_STARTS):
            with memory_file() as messages:
                self._begin(messages)
                if self._receive() == "ready":
                    return self
                self.__exit__()
                if said := os.pread(messages, 10_000, 0).decode(errors="replace").strip():
                    raise SandboxError(said)
        raise SandboxError(f"ended {_STARTS} times before its first test, and said nothing")

    def _begin(self, messages: int) -> None:
        self._expired = False
        self._control, inner_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with inner_control:
            self._process = self._start(inner_control.fileno(), messages)
        self._watch = threading.Timer(self._wall_limit_s, self._end)
        self._watch.start()

    def __exit__(self, *exception: object) -> None:
        self._watch.cancel()
        self._control.close()
        self._kill()
        self._process.wait()

    def load(self, kind: Kind, text: str) -> None:
        """Use this text for the tests that follow."""
        with memory_file(text.encode(errors="surrogatepass")) as source:
            self._send(f"load {kind}", [source])

    def start_test(self, fds: list[int]) -> None:
        """Starts a test: with [stdin, stdout] for a script, else with [stream socket]."""
        self._send("test", fds)

    def wait(self) -> str:
        """How the test ended: `exit STATUS`, `time`, `memory`, or "" where it ended the sandbox."""
        ending = self._receive()
        return "time" if not ending and self._expired else ending

    def _end(self) -> None:
        self._expired = True
        self._kill()

    def _kill(self) -> None:
        # With its group: bubblewrap's child waits for ever for one that is killed as it starts.
        if self._process.returncode is None:  # else its number may be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, packet: str, fds: list[int]) -> None:
        with contextlib.suppress(OSError):  # if the sandbox has ended, `wait` will notice
            socket.send_fds(self._control, [packet.encode()], fds)

    def _receive(self) -> str:
        try:
            return self._control.recv(100).decode(errors="replace")
        except OSError:
            return ""

    def _start(self, control: int, messages: int) -> subprocess.Popen[bytes]:
        config = self._config
        interpreter = find_interpreter(config.python)
        limits = [
            # A user ID that hardly any other process on this host has, so that the limit on
            # processes counts only those of this sandbox.
            *(20_000 + os.getpid() % 40_000, config.memory_mb << 20),
            *(config.processes, config.output_mb << 20),
            *(config.test_cpu_limit_s, config.test_wall_limit_s, config.cpu_limit_s),
        ]
        with memory_file(seccomp_filter()) as seccomp:
            if config.sandbox == "unsafe":
                command, folder, fds = [], str(INSIDE), [control]
            else:
                command = bubblewrap_command(interpreter, seccomp)
                folder, fds = "/inside", [control, seccomp]
            # No environment, no site-packages by themselves, no compiled files written.
            command += [interpreter.executable, "-I", "-S", "-B", "-X", "utf8"]
            command += [f"{folder}/main.py", str(control), *map(str, limits)]
            names = " ".join(f"{name}={path}" for name, path in interpreter.names.items())
            # A process's memory is laid out, as it starts, for the stack that it may have then.
            shell = ["/bin/sh", "-c", f'ulimit -S -s {_STACK_KB}; exec "$@"', "sh"]
            return subprocess.Popen(
                [*shell, *command, ":".join(interpreter.search_path), names],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                pass_fds=fds,
                cwd="/",
                process_group=0,
            )


@contextlib.contextmanager
def memory_file(content: bytes = b"") -> Iterator[int]:
    """A file descriptor of a file in memory, at its start."""
    fd = os.memfd_create("sandbox")
    try:
        with memoryview(content) as rest:
            written = 0
            while written < len(content):
                written += os.write(fd, rest[written:])
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@functools.cache
def check_sandbox(config: CodeRewardConfig) -> None:
    """Raises UserError if programs cannot be run as the config asks; tried once per process."""
    try:
        with Sandbox(config, wall_limit_s=60):
            pass
    except SandboxError as error:
        raise UserError(
            "rewards.code.sandbox: bubblewrap does not run here, and a model's programs are not "
            f"run without it. It said: {error}. In a container it needs the right to make "
            "namespaces (docker run --security-opt seccomp=unconfined --cap-add SYS_ADMIN, or "
            f"user namespaces switched on){UNSAFE_HINT}"
        ) from error
