"""Runs one task of a job's step, as its parent.

    python -m klear_megatron.launch.role SNAPSHOT/job.json ROLE DIR

srun starts one per task; DIR is the folder of this attempt. The parent gives the command its ranks,
addresses and environment, writes what it prints to `DIR/ROLE-NODE.log`, passes SIGTERM on, and
reports its end in `DIR/ended/ROLE-RANK.json`. It needs only the standard library of Python 3.9.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from klear_megatron.launch.reports import Report, write_json, write_report
from klear_megatron.platform.exit_codes import BAD_INPUT, CONTINUE, FINISHED
from klear_megatron.platform.orphans import blocked, die_with_parent

_ERROR_LINES = 50
_OURS = re.compile(r"error( on rank \d+)?: (?P<message>.*)")
_CRASH = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b.*|Fatal Python error.*")
_WAIT_TO_BE_ENDED_S = 20.0
_TOLD_TOGETHER_S = 5.0
_MASTER_S = 300.0


@dataclass(frozen=True)
class Task:
    """Which task this is, as srun says."""

    rank: int
    local_rank: int
    tasks: int
    local_tasks: int
    node: str

    @classmethod
    def of_environment(cls) -> Task:
        """The task of this process."""
        env = os.environ
        return cls(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_LOCALID"]),
            int(env["SLURM_NTASKS"]),
            # "8(x2)": the same number on each node
            int(env["SLURM_TASKS_PER_NODE"].partition("(")[0]),
            env["SLURMD_NODENAME"],
        )


def main() -> int:
    job_file, role, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    task = Task.of_environment()
    if role.startswith("preflight"):
        problem = _unfit(job)
        _report(folder, role, task, BAD_INPUT if problem else FINISHED, problem, explicit=True)
        return 0
    parent = _Parent(role, task, folder)
    with contextlib.ExitStack() as stack:
        attempt = json.loads((folder / "attempt.json").read_text())
        start = _Start(job, task, folder, attempt, stack)
        if role == "server":
            command = start.server_command()
            environment = dict(job["servers"]["environment"])
        else:
            command = list(job["main"]["command"])
            if attempt["urls"]:
                command += ["--rollout.urls", json.dumps(attempt["urls"])]
            environment = dict(job["main"]["environment"])
            environment |= start.rank_environment()
        return parent.run(command, {**os.environ, **environment})


def _unfit(job: dict[str, Any]) -> str:
    """What this node lacks for the job; empty if nothing."""
    for module in job["needs"]:
        if importlib.util.find_spec(module) is None:
            return f"{sys.executable} has no {module}; set up the package's environment there"
    for program in job["programs"]:
        if not os.access(program, os.X_OK):
            return f"{program} is not there (rollout.python)"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        gpus = listed.stdout.count("GPU ")
        if not listed.returncode and gpus < job["gpus_per_node"]:
            return f"shows {gpus} GPUs, but the job uses {job['gpus_per_node']} of each node"
    return ""


@dataclass(frozen=True)
class _Start:
    """What decides how a task's command is started.

    Args:
        attempt: what the conductor has written for the tasks.
        stack: other jobs of this user on this host leave the ports that are taken alone until this
            ends.
    """

    job: dict[str, Any]
    task: Task
    folder: Path
    attempt: dict[str, Any]
    stack: contextlib.ExitStack

    def rank_environment(self) -> dict[str, str]:
        """What torchrun would set. The first rank chooses the port at which the ranks meet."""
        task, address = self.task, next(iter(self.attempt["addresses"].values()))
        file = self.folder / "master_port"
        if task.rank == 0:
            write_json(file, self._take_ports(address, 1))
        deadline = time.monotonic() + _MASTER_S
        while not file.exists():
            if time.monotonic() > deadline:
                sys.exit(f"error: the first rank did not write {file} within {_MASTER_S:.0f} s")
            time.sleep(0.1)
        return {
            "RANK": str(task.rank),
            "WORLD_SIZE": str(task.tasks),
            "LOCAL_RANK": str(task.local_rank),
            "LOCAL_WORLD_SIZE": str(task.local_tasks),
            "MASTER_ADDR": address,
            "MASTER_PORT": file.read_text(),
        }

    def server_command(self) -> list[str]:
        """`klear-megatron serve` for this node's servers."""
        servers, task = self.job["servers"], self.task
        count, address = servers["per_node"], self.attempt["addresses"][task.node]
        overrides = {
            "rollout.host": address,
            "rollout.port": self._take_ports(address, count),
            "rollout.num_servers": count,
            "announce": str(self.folder / "servers" / f"{task.node}.json"),
            "run_dir": str(self.folder / f"server-{task.node}"),
            # Servers with one seed would draw the same responses.
            "seed": servers["seed"] + task.rank * count,
        }
        if "first_gpu" in servers:  # all on one host
            gpus = count * servers["gpus_per_server"]
            overrides["rollout.base_gpu_id"] = servers["first_gpu"] + task.rank * gpus
        flags = [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]
        return [*servers["command"], *flags]

    def _take_ports(self, address: str, count: int) -> int:
        """The first of `count` free ports in a row."""
        locks = Path(tempfile.gettempdir()) / f"klear-megatron-ports-{os.getuid()}"
        locks.mkdir(exist_ok=True, mode=0o700)
        first, last = self.job["ports"]
        starts = list(range(first, last - count + 2))
        random.SystemRandom().shuffle(starts)
        for start in starts:
            with contextlib.ExitStack() as held:
                try:
                    for port in range(start, start + count):
                        lock = held.enter_context((locks / str(port)).open("w"))
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        with socket.socket() as probe:
                            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                            probe.bind((address, port))
                except OSError:
                    continue
                self.stack.enter_context(held.pop_all())
                return start
        sys.exit(
            f"error: no {count} free ports at {address} between {first} and {last} (launch.ports)"
        )


class _Parent:
    """The parent of one command."""

    def __init__(self, role: str, task: Task, folder: Path) -> None:
        self._role, self._task, self._folder = role, task, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False
        self._last = collections.deque[str](maxlen=_ERROR_LINES)
        signal.signal(signal.SIGTERM, self._pass_on)

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        """Returns 0 if the command ended well or can go on later.

        After a failure it waits to be ended, so that srun does not kill ranks at once that may
        still say why they fail.
        """
        log = self._folder / f"{self._role}-{self._task.node}.log"
        with log.open("ab", buffering=0) as output:
            with blocked(signal.SIGTERM):  # until it can be passed on
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    preexec_fn=functools.partial(_prepare_command, os.getpid()),
                )
            assert self._process.stdout is not None
            pump = threading.Thread(target=self._copy, args=(self._process.stdout, output))
            pump.daemon = True
            pump.start()
            code = self._process.wait()
            pump.join(timeout=2)  # a process that the command left behind may hold the pipe
        # Slurm signals every process of a step, and this one may come after the command.
        if code == -signal.SIGTERM and self._is_told_within(_TOLD_TOGETHER_S):
            code = CONTINUE  # it goes on from the newest checkpoint
        if code in (FINISHED, CONTINUE):
            _report(self._folder, self._role, self._task, code)
            return FINISHED
        error, explicit = _first_error(list(self._last))
        if code < 0:
            error = f"killed by {signal.Signals(-code).name}; the last line was: {error}"
        _report(self._folder, self._role, self._task, code, error, explicit=explicit)
        self._is_told_within(_WAIT_TO_BE_ENDED_S)
        return code if code > 0 else 128 - code

    def _is_told_within(self, seconds: float) -> bool:
        """Waits for SIGTERM, and returns whether it has come."""
        deadline = time.monotonic() + seconds
        while not self._told and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._told

    def _pass_on(self, number: int, _: object) -> None:
        self._told = True
        if self._process is not None:
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)  # a stopped process would never see it

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        label = f"{self._task.rank}: ".encode() if self._task.local_tasks > 1 else b""
        for line in source:
            target.write(label + line)
            self._last.append(line.decode(errors="replace").rstrip())


def _prepare_command(parent: int) -> None:
    """Runs in the forked process, which has this one's handler until it executes the command."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _report(
    folder: Path, role: str, task: Task, code: int, error: str = "", *, explicit: bool = False
) -> None:
    report = Report(role, task.rank, task.node, code, time.time(), error, explicit)
    write_report(report, folder)


def _first_error(lines: list[str]) -> tuple[str, bool]:
    """The line that says what failed, and whether it is a message of this package."""
    for index, line in enumerate(lines):
        if found := _OURS.fullmatch(line):
            return "\n".join([found["message"], *lines[index + 1 :]]), True
    crashes = [line for line in lines if _CRASH.fullmatch(line)]
    return (crashes or [line for line in lines if line.strip()] or ["it said nothing"])[-1], False


if __name__ == "__main__":
    sys.exit(main())
