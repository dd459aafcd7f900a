"""Where a job's steps run: as sruns of a Slurm job, or as processes of this host.

Used by `conductor`; needs only the standard library of Python 3.9.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from klear_megatron.platform.orphans import die_with_parent


class Step(Protocol):
    """The tasks of one role, started together."""

    name: str
    tasks: int

    def poll(self) -> int | None:
        """None while any task runs; then an exit code."""

    def signal(self, number: int) -> None:
        """Sends a signal to every task."""

    def kill(self) -> None:
        """Ends every task and returns when they have ended."""

    def says(self) -> list[str]:
        """The last lines that the step printed besides its tasks' own."""


class Cluster(Protocol):
    """The nodes of a job."""

    told_to_end: bool
    """Whether this process got SIGTERM: the job is cancelled, preempted, or stopped by Ctrl-C."""

    def nodes(self) -> list[str]: ...

    def address(self, node: str) -> str:
        """The address of a node that the others can connect to."""

    def attempt_name(self) -> str:
        """`<job>-<restart>`: a name that no other attempt of the run has."""

    def start(self, role: str, step: Mapping[str, Any], nodes: Sequence[str], folder: Path) -> Step:
        """Starts `tasks_per_node` tasks of a role on each node."""

    def requeue(self) -> None:
        """Has the job run again. Returns only where that is this process's own work."""


def find_cluster(job: Mapping[str, Any]) -> Cluster:
    """The Slurm job that this process is the batch script of; outside of one, this host."""
    return SlurmJob(job) if "SLURM_JOB_ID" in os.environ else ThisHost(job)


class _Told:
    """Notes a SIGTERM or Ctrl-C instead of dying of it."""

    def __init__(self) -> None:
        self.told_to_end = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.told_to_end = True


def _task_command(job: Mapping[str, Any], role: str, folder: Path) -> list[str]:
    module = [job["python"], "-m", "klear_megatron.launch.role"]
    return [*job["prefix"], *module, f"{job['snapshot']}/job.json", role, str(folder)]


class SlurmJob(_Told):
    """The allocation of the Slurm job that this process is the batch script of."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__()
        self._job = job
        self._id = os.environ["SLURM_JOB_ID"]
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        # Slurm's commands print the tasks of an array by this name.
        self._name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else self._id

    def nodes(self) -> list[str]:
        groups = int(os.environ.get("SLURM_HET_SIZE", "0"))
        names = [f"SLURM_JOB_NODELIST_HET_GROUP_{group}" for group in range(groups)]
        lists = [os.environ[name] for name in names or ["SLURM_JOB_NODELIST"]]
        return [node for nodes in lists for node in _ask("scontrol", "show", "hostnames", nodes)]

    def address(self, node: str) -> str:
        fields = " ".join(_ask("scontrol", "show", "node", node)).split()
        named = [field.partition("=")[2] for field in fields if field.startswith("NodeAddr=")]
        return socket.gethostbyname(named[0] if named else node)

    def attempt_name(self) -> str:
        return f"{self._name}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"

    def start(self, role: str, step: Mapping[str, Any], nodes: Sequence[str], folder: Path) -> Step:
        per_node, group = step["tasks_per_node"], step.get("het_group")
        # --nodelist pins the nodes; --relative would only leave out those before.
        flags = [
            f"--job-name={role}",
            f"--nodes={len(nodes)}",
            f"--nodelist={','.join(nodes)}",
            f"--ntasks={per_node * len(nodes)}",
            f"--ntasks-per-node={per_node}",
            # Ranks have threads and workers; one CPU each would starve them.
            "--cpu-bind=none",
            # A node that is not fit must not keep the others from saying whether they are.
            f"--kill-on-bad-exit={0 if role.startswith('preflight') else 1}",
            *([f"--het-group={group}"] if group is not None else []),
            *self._job["srun_flags"],
        ]
        log = folder / f"srun-{role}.log"
        command = ["srun", *flags, *_task_command(self._job, role, folder)]
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        # A component of a heterogeneous job is a job with an id of its own.
        job = self._name if group is None else os.environ[f"SLURM_JOB_ID_HET_GROUP_{group}"]
        return _Srun(process, role, per_node * len(nodes), log, job)

    def requeue(self) -> None:
        _ask("scontrol", "requeue", self._id)
        time.sleep(600)  # Slurm ends this process; an exit of its own would complete the job


class _Srun:
    """One srun."""

    def __init__(
        self, process: subprocess.Popen[bytes], role: str, tasks: int, log: Path, job: str
    ) -> None:
        self.name, self.tasks = f"the srun of {role}", tasks
        self._process, self._role, self._log, self._job = process, role, log, job

    def poll(self) -> int | None:
        return self._process.poll()

    def signal(self, number: int) -> None:
        # With --steps, squeue shows those of all jobs, also with --jobs.
        for line in _ask("squeue", "--steps", "--me", "--noheader", "--format=%i %j"):
            step, name = line.split(maxsplit=1)
            if name.strip() == self._role and step.partition(".")[0] == self._job:
                # scancel complains about a step that has just ended.
                command = ["scancel", f"--signal={signal.Signals(number).name[3:]}", step]
                subprocess.run(command, stderr=subprocess.DEVNULL, check=False, timeout=60)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def says(self) -> list[str]:
        lines = self._log.read_text(errors="replace").splitlines()
        code = self._process.poll()
        killed = [f"it was killed by {signal.Signals(-code).name}"] if code and code < 0 else []
        return [*killed, *lines[-5:]]


class ThisHost(_Told):
    """This host as the only node. A role that wants several nodes has all its tasks here."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__()
        self._job = job
        self._name = f"local{time.strftime('%Y%m%d%H%M%S')}"
        self._restarts = 0

    def nodes(self) -> list[str]:
        return [f"local{index}" for index in range(self._job["nodes"])]

    def address(self, node: str) -> str:
        return "127.0.0.1"

    def attempt_name(self) -> str:
        return f"{self._name}-{self._restarts}"

    def start(self, role: str, step: Mapping[str, Any], nodes: Sequence[str], folder: Path) -> Step:
        per_node = step["tasks_per_node"]
        total = per_node * len(nodes)
        processes = []
        for rank in range(total):
            names = {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),  # all are on this host
                "SLURM_NTASKS": str(total),
                "SLURM_TASKS_PER_NODE": str(total),
                "SLURMD_NODENAME": nodes[rank // per_node],
            }
            command = _task_command(self._job, role, folder)
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **names},
                    start_new_session=True,
                    preexec_fn=functools.partial(die_with_parent, os.getpid()),
                )
            )
        return _Processes(role, processes)

    def requeue(self) -> None:
        self._restarts += 1


class _Processes:
    """Processes of this host."""

    def __init__(self, role: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.name, self.tasks = role, len(processes)
        self._processes = processes

    def poll(self) -> int | None:
        codes = [process.poll() for process in self._processes]
        ended = [code for code in codes if code is not None]
        return None if len(ended) < len(codes) else max(ended, key=abs)

    def signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def says(self) -> list[str]:
        return []


def _ask(*command: str) -> list[str]:
    """The lines that a command prints; none if it fails, after a word about that."""
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        print(f"{' '.join(command)}: {answer.stderr.strip()}", file=sys.stderr, flush=True)
    return [line for line in answer.stdout.splitlines() if line.strip()]
