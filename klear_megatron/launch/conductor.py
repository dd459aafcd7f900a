"""Runs one job from its batch script: starts the steps, watches them, ends them, decides what next.

    python3 -m klear_megatron.launch.conductor SNAPSHOT/job.json

It runs on the job's first node, outside any container, and needs only the standard library of
Python 3.9. In a Slurm job its steps are sruns; elsewhere they are processes of this host. Each task
of a step runs `role`, which reports by files: `servers/NODE.json` once a node's servers answer,
and `ended/ROLE-RANK.json` when a task has ended.

Exit codes: 0, finished; 75, told to end and can go on; 1, failed; 2, bad input.
"""

from __future__ import annotations

import json
import signal
import sys
import time
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
_BEGIN = time.monotonic()


class JobError(Exception):
    """The job cannot go on. `code` is the exit code of the process that ended first, if any."""

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
        if code == CONTINUE:
            again = not cluster.told_to_end
            how = "goes on" if again else "run it again to go on"
            say(f"{job['name']}: told to end; {how} from the newest checkpoint")
        else:
            again = _may_fail_again(job, code, message, first_step)
            # The last line of the log says what failed.
            say(f"{'trying again' if again else 'giving up'} after this error:")
            print(f"error: {message}", flush=True)
        if not again or not job["requeue"]:
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
    # Once a step was taken, the input is good, and code 2 says that servers were lost.
    bad_input = code == BAD_INPUT and step <= first_step
    if bad_input or in_a_row >= job["failures_in_a_row"]:
        (snapshot / "stopped").write_text(message)
        return False
    return True


def _newest_step(run_dir: Path) -> int:
    """The last step whose metrics the trainer has written; -1 if none."""
    try:
        rows = (run_dir / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(rows[-1])["step"])
    except (OSError, ValueError, IndexError):
        return -1


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
        (self._folder / "outcome.json").write_text(json.dumps(outcome))
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
            self._wait_for_servers(server_nodes, servers["deadline_s"])
        elif self._job["servers_of"]:
            self._urls = self._servers_of_another_job(Path(self._job["servers_of"]))
        self._describe_attempt(addresses)
        self._start(main["role"], main, nodes[: main["nodes"]])
        return self._wait_for(main["role"])

    def _describe_attempt(self, addresses: dict[str, str]) -> None:
        """Writes what the tasks have to know and only the running job can say."""
        write_json(self._folder / "attempt.json", {"addresses": addresses, "urls": self._urls})

    def _preflight(self, nodes: list[str]) -> None:
        """Checks every node before any of them holds GPUs for long.

        Raises:
            JobError: a node cannot write to the run directory, or lacks what the job needs.
        """
        step = self._start("preflight", {"nodes": len(nodes), "tasks_per_node": 1}, nodes)
        deadline = time.monotonic() + _PREFLIGHT_S
        while step.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S / 3)
        ended = {one.node: one for one in read_reports(self._folder, "preflight")}
        problems = [f"{node}: {one.error}" for node, one in ended.items() if one.code]
        problems += [
            f"{node}: cannot run {self._job['python']}, or does not see {self._folder}; both have "
            "to be on a file system that all nodes share"
            for node in nodes
            if node not in ended
        ]
        if problems:
            raise JobError("\n  ".join(["a node is not fit for the job:", *problems, *step.says()]))
        del self._steps["preflight"]

    def _wait_for_servers(self, nodes: list[str], deadline_s: float) -> None:
        """Returns when all servers of all nodes answer.

        Raises:
            JobError: a server ended, or did not answer in time; names the nodes.
        """
        say(f"waiting for the servers of {', '.join(nodes)}, at most {deadline_s} s")
        deadline = time.monotonic() + deadline_s
        missing = list(nodes)
        while missing:
            for node in list(missing):
                file = self._folder / "servers" / f"{node}.json"
                if file.exists():
                    urls = json.loads(file.read_text())
                    say(f"{node}: {', '.join(urls)} answers")
                    self._urls += urls
                    missing.remove(node)
            self._check()
            if missing and time.monotonic() > deadline:
                raise JobError(
                    f"the servers of {', '.join(missing)} did not answer within {deadline_s} s "
                    f"(launch.servers.deadline_s); see {self._folder}/server-*.log"
                )
            time.sleep(_POLL_S)

    def _servers_of_another_job(self, run_dir: Path) -> list[str]:
        launched = run_dir / "launch"
        try:
            attempt = launched / (launched / "newest").read_text()
        except OSError:
            raise JobError(
                f"launch.servers.run: {run_dir} has no launched job; launch one with verb: serve"
            ) from None
        files = sorted((attempt / "servers").glob("*.json"))
        urls = [url for file in files for url in json.loads(file.read_text())]
        if not urls or (attempt / "outcome.json").exists():
            raise JobError(f"launch.servers.run: no servers of {run_dir} answer; see {attempt}")
        say(f"servers of {run_dir}: {', '.join(urls)}")
        return urls

    def _start(self, role: str, step: dict[str, Any], nodes: list[str]) -> Step:
        if role != "preflight":
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
