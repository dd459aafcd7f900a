"""Runs one job from its batch script: starts the steps, watches them, ends them, decides what next.

    python3 -m klear_megatron.launch.conductor SNAPSHOT/job.json

It runs on the job's first node, outside any container, and needs only the standard library of
Python 3.9. In a Slurm job its steps are sruns; elsewhere they are processes of this host. Each task
of a step runs `role`, which reports by files: `servers/NODE.json` once a node's servers answer,
and `ended/ROLE-RANK.json` when a task has ended.

Exit codes: 0, finished; 75, told to end and can go on; 1, failed; 2, bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from klear_megatron.launch.clusters import Cluster, Step, find_cluster
from klear_megatron.launch.reports import first_failure, read_reports, write_json
from klear_megatron.platform.exit_codes import BAD_INPUT, CONTINUE, FAILED, FINISHED

_POLL_S = 0.3
_GATHER_S = 3.0
"""After the first failure, other ranks' errors may arrive this much later: the first one counts."""
_KILL_AFTER_S = 10.0
_PREFLIGHT_S = 300.0
_TAIL_BYTES = 2**20
_BEGIN = time.monotonic()


class JobError(Exception):
    """The job cannot go on, because of a failure or because it was told to end (CONTINUE)."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Prints a line with the time of day and the seconds since the start."""
    stamp = f"{time.strftime('%H:%M:%S')} +{time.monotonic() - _BEGIN:.0f}s"
    print(f"[{stamp}] {message}", flush=True)


def main() -> int:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cluster = find_cluster(job)
    snapshot = Path(job["snapshot"])
    if (snapshot / "finished").exists():
        say(f"{job['name']}: finished by an earlier job; nothing to do")
        return FINISHED
    if (snapshot / "stopped").exists():
        say(f"{job['name']}: not tried again: {(snapshot / 'stopped').read_text()}")
        return FAILED
    while True:
        first_step = _newest_step(Path(job["run_dir"]))
        code, message = Attempt(job, cluster).run()
        if code == FINISHED:
            (snapshot / "finished").touch()
            say(f"{job['name']}: finished")
            return FINISHED
        again = job["requeue"] and not cluster.told_to_end
        if code == CONTINUE:
            how = "goes on" if again else "run it again to go on"
            say(f"{job['name']}: told to end{message}; {how} from the newest checkpoint")
        else:
            may = _may_fail_again(job, code, message, first_step)
            again = again and may
            # The last line of the log says what failed.
            what = "trying again after" if again else "ended by" if may else "giving up after"
            say(f"{what} this error:")
            print(f"error: {message}", flush=True)
        if not again:
            return code
        cluster.requeue()


def _may_fail_again(job: dict[str, Any], code: int, message: str, first_step: int) -> bool:
    """Counts failures without a new step in between. Leaves `stopped` once there were too many.

    Args:
        first_step: the newest step before the attempt that failed.
    """
    snapshot = Path(job["snapshot"])
    file = snapshot / "failures.json"
    past = json.loads(file.read_text()) if file.exists() else {"in_a_row": 0, "step": -1}
    step = _newest_step(Path(job["run_dir"]))
    in_a_row = 1 if step > past["step"] else past["in_a_row"] + 1
    file.write_text(json.dumps({"in_a_row": in_a_row, "step": step}))
    # Once a step was taken, the input is good, and code 2 says what else failed, such as servers.
    bad_input = code == BAD_INPUT and step <= first_step
    if bad_input or in_a_row >= job["failures_in_a_row"]:
        (snapshot / "stopped").write_text(message)
        return False
    return True


def _newest_step(run_dir: Path) -> int:
    """The last step whose metrics the trainer has written; -1 if none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            rows = file.read().splitlines()
    except OSError:
        return -1
    for row in reversed(rows):
        with contextlib.suppress(ValueError, KeyError):  # half a row, at either end
            return int(json.loads(row)["step"])
    return -1


_Servers = tuple[dict[str, list[str]], list[str]]
"""Addresses of the servers that answer, by node; and what is missing."""


def _answering(folder: Path, nodes: Iterable[str]) -> _Servers:
    """The servers of an attempt that are to run on these nodes."""
    files = {node: folder / "servers" / f"{node}.json" for node in nodes}
    answering = {
        node: json.loads(file.read_text()) for node, file in files.items() if file.exists()
    }
    return answering, [node for node in files if node not in answering]


def _answering_of_run(run_dir: Path) -> _Servers:
    """The servers of a running job that was launched with `verb: serve`."""
    launched = run_dir / "launch"
    try:
        attempt = launched / (launched / "newest").read_text()
        nodes = json.loads((attempt / "attempt.json").read_text())["addresses"]
    except OSError:
        return {}, [f"{run_dir} (its job has not started)"]
    if (attempt / "outcome.json").exists():
        return {}, [f"{run_dir} (its job has ended)"]
    return _answering(attempt, nodes)


class Attempt:
    """One start of a job's steps. A requeued job makes another attempt in another folder."""

    def __init__(self, job: dict[str, Any], cluster: Cluster) -> None:
        self._job = job
        self._cluster = cluster
        self._folder = Path(job["run_dir"]) / "launch" / cluster.attempt_name()
        self._steps: dict[str, Step] = {}
        self._urls: list[str] = []

    def run(self) -> tuple[int, str]:
        """Returns the exit code, and what is to be said about it."""
        for name in ("ended", "servers"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        newest = self._folder.parent / "newest"
        newest.write_text(self._folder.name)
        try:
            code, message = self._run(), ""
        except JobError as error:
            code, message = error.code, str(error)
        finally:
            self._end_all()
        outcome = {"code": code, "message": message, "time": time.time()}
        write_json(self._folder / "outcome.json", outcome)
        return code, message

    def _run(self) -> int:
        main, servers = self._job["main"], self._job["servers"]
        nodes = self._cluster.nodes()
        wanted = self._job["nodes"]
        if len(nodes) < wanted:
            message = f"the job has {len(nodes)} nodes, but its layout needs {wanted}"
            raise JobError(message, BAD_INPUT)
        say(f"{self._job['name']}: {', '.join(nodes)}; logs in {self._folder}")
        self._preflight(nodes[:wanted])
        addresses = {node: self._cluster.address(node) for node in nodes}
        self._describe_attempt(addresses)
        if server_nodes := nodes[main["nodes"] : wanted]:
            self._start("server", servers, server_nodes)
            self._wait_for_servers(
                lambda: _answering(self._folder, server_nodes), servers["deadline_s"]
            )
        elif other := self._job["servers_of"]:
            run_dir = Path(other["run_dir"])
            self._wait_for_servers(lambda: _answering_of_run(run_dir), other["deadline_s"])
        self._describe_attempt(addresses)
        self._start(main["role"], main, nodes[: main["nodes"]])
        return self._wait_for(main["role"])

    def _describe_attempt(self, addresses: dict[str, str]) -> None:
        """Writes what the tasks have to know and only the running job can say."""
        write_json(self._folder / "attempt.json", {"addresses": addresses, "urls": self._urls})

    def _preflight(self, nodes: list[str]) -> None:
        """Checks every node before any of them holds GPUs for long.

        Raises:
            JobError: a node cannot write to the run directory, or lacks what the job needs. Or the
                job was told to end.
        """
        main, servers = self._job["main"], self._job["servers"]
        parts = {"preflight": (main, nodes[: main["nodes"]])}
        if len(nodes) > main["nodes"]:  # in a heterogeneous job, another component
            parts["preflight-servers"] = (servers, nodes[main["nodes"] :])
        steps = [
            self._start(role, {"tasks_per_node": 1, "het_group": step["het_group"]}, part)
            for role, (step, part) in parts.items()
        ]
        deadline = time.monotonic() + _PREFLIGHT_S
        while any(step.poll() is None for step in steps) and time.monotonic() < deadline:
            time.sleep(_POLL_S / 3)
            if self._cluster.told_to_end:
                raise JobError(" while its nodes were checked", CONTINUE)
        ended = {one.node: one for one in read_reports(self._folder, "preflight")}
        problems = [f"{node}: {one.error}" for node, one in ended.items() if one.code]
        problems += [
            f"{node}: cannot run {self._job['python']}, or does not see {self._folder}; both have "
            "to be on a file system that all nodes share"
            for node in nodes
            if node not in ended
        ]
        if problems:
            said = [line for step in steps for line in step.says()]
            raise JobError("\n  ".join(["a node is not fit for the job:", *problems, *said]))
        for role in parts:
            del self._steps[role]

    def _wait_for_servers(self, look: Callable[[], _Servers], deadline_s: float) -> None:
        """Returns when all servers answer.

        Args:
            look: says which answer by now.

        Raises:
            JobError: a server ended, or did not answer in time; names who is missing. Or the job
                was told to end.
        """
        say(f"waiting for the servers, at most {deadline_s} s")
        deadline = time.monotonic() + deadline_s
        said: set[str] = set()
        while True:
            answering, missing = look()
            for node in answering.keys() - said:
                say(f"{node}: {', '.join(answering[node])} answers")
            said |= answering.keys()
            if not missing:
                self._urls = [url for urls in answering.values() for url in urls]
                return
            # Servers that end well while they are waited for were told to, as before a time limit.
            told = any(step.poll() is not None for step in self._steps.values())
            self._check()
            if told or self._cluster.told_to_end:
                raise JobError(" while it waited for the servers", CONTINUE)
            if time.monotonic() > deadline:
                raise JobError(
                    f"the servers of {', '.join(missing)} did not answer within {deadline_s} s "
                    f"(launch.servers.deadline_s); see {self._folder}/server-*.log"
                )
            time.sleep(_POLL_S)

    def _start(self, role: str, step: dict[str, Any], nodes: list[str]) -> Step:
        if not role.startswith("preflight"):
            say(f"starting {role} on {', '.join(nodes)}")
        self._steps[role] = self._cluster.start(role, step, nodes, self._folder)
        return self._steps[role]

    def _wait_for(self, role: str) -> int:
        """Returns FINISHED or CONTINUE when all tasks of the step have ended.

        Raises:
            JobError: one of the job's tasks failed.
        """
        step, passed_on = self._steps[role], False
        while step.poll() is None:
            self._check()
            if self._cluster.told_to_end and not passed_on:
                say(f"told to end; passing it on to {role}")
                step.signal(signal.SIGTERM)
                passed_on = True
            time.sleep(_POLL_S)
        self._check()
        codes = [one.code for one in read_reports(self._folder, role)]
        return CONTINUE if CONTINUE in codes else FINISHED

    def _check(self) -> None:
        """Returns if all is well so far.

        Raises:
            JobError: a task failed, or a step ended before its tasks.
        """
        gone = [
            step
            for role, step in self._steps.items()
            if step.poll() is not None and len(read_reports(self._folder, role)) < step.tasks
        ]
        if not gone and first_failure(read_reports(self._folder)) is None:
            return
        time.sleep(_GATHER_S)
        # Slurm kills the tasks of an srun that was killed, and they may still report that.
        killed = [step for step in self._steps.values() if (step.poll() or 0) < 0]
        if not killed and (first := first_failure(read_reports(self._folder))):
            raise JobError(str(first), BAD_INPUT if first.code == BAD_INPUT else FAILED)
        first_gone = (killed or gone)[0]
        message = [f"{first_gone.name} was ended from outside", *first_gone.says()]
        raise JobError("\n  ".join(message))

    def _end_all(self) -> None:
        """Ends the steps that are left: SIGTERM first, SIGKILL after some seconds."""
        # The tasks of an srun that was killed may live on.
        left = [
            step for step in self._steps.values() if (step.poll() or 0) < 0 or step.poll() is None
        ]
        for step in left:
            step.signal(signal.SIGTERM)
        deadline = time.monotonic() + _KILL_AFTER_S
        while any(step.poll() is None for step in left) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for step in left:
            step.kill()


if __name__ == "__main__":
    sys.exit(main())
