"""Jobs on a real Slurm end, go on and say why, whatever happens to their processes."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from klear_megatron.cli import main
from klear_megatron.config import load_config
from klear_megatron.launch.array import write_array
from klear_megatron.launch.status import cancel, status
from klear_megatron.rl.config import RLConfig
from tests.commands import ROOT
from tests.launch.conftest import wait_for
from tests.launch.jobs import (
    FIRST_NODE,
    FIRST_NODES,
    edit_job,
    nemo_run,
    outcomes,
    processes_with,
    queue,
    run_to_end,
    start_role,
    submit,
    wait_for_restart,
    write_job,
    write_waiting_job,
)

ODD = ["two words", "it's", 'a "quote"', "$HOME `id`", "two\nlines", ""]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "a run's folder"


@pytest.fixture
def no_job_is_left(slurm_conf: Path, beside_the_pipeline: None) -> Iterator[None]:
    others = queue()
    yield
    while jobs := queue() - others:
        subprocess.run(["scancel", *jobs], check=True)
        time.sleep(0.3)


@pytest.fixture
def make_job(no_job_is_left: None, run_dir: Path) -> Callable[..., Path]:
    """Writes a job whose ranks run Python code, and returns its script."""

    def make(code: str, *arguments: str, **launch: Any) -> Path:
        return write_job(run_dir, code, *arguments, **launch).snapshot / "job.sh"

    return make


def test_values_reach_every_rank_as_they_are_written(make_job, run_dir, tmp_path):
    code = (
        "import json, os, sys; from pathlib import Path\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'Mixed_Case')\n"
        "values = [sys.argv[2:], *(os.environ[name] for name in names)]\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(values))"
    )
    script = make_job(
        code, str(tmp_path), *ODD, ranks_per_node=2, environment={"Mixed_Case": "\n".join(ODD)}
    )
    exit_code, lines = run_to_end(script)
    assert exit_code == 0, lines
    for rank in range(4):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == [ODD, str(rank), "4", str(rank % 2), "2", "\n".join(ODD)]
    assert (script.parent / "finished").exists()


def test_a_killed_rank_ends_the_job_and_is_named(make_job, run_dir, capsys):
    code = (
        "import os, time\n"
        "if os.environ['RANK'] == '1': print('last words', flush=True); os.kill(os.getpid(), 9)\n"
        "time.sleep(300)"
    )
    begin = time.monotonic()
    exit_code, lines = run_to_end(make_job(code, requeue=False, **FIRST_NODES))
    assert time.monotonic() - begin < 45
    assert exit_code == 1
    assert lines[-1].startswith("error: trainer on node2, rank 1, ended with code -9")
    assert "killed by SIGKILL" in lines[-1]
    assert "last words" in lines[-1]
    assert lines[-2].endswith("ended by this error:")
    assert main(["status", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "it ended: failed" in said
    assert "first error: trainer on node2, rank 1, ended with code -9: killed by SIGKILL" in said
    assert main(["logs", str(run_dir)]) == 0
    (attempt,) = run_dir.glob("launch/*-0")
    said = capsys.readouterr().out
    assert f"==> {attempt}/trainer-node1.log\n" in said
    assert f"==> {attempt}/trainer-node2.log\n    last words\n" in said


def test_failures_in_a_row_without_a_new_step_end_the_tries(make_job, run_dir):
    """The second failure comes after a new step, and the third one does not."""
    code = (
        "import json, os, sys\n"
        "attempt = int(os.environ.get('SLURM_RESTART_COUNT', 0))\n"
        "if attempt < 2: print(json.dumps({'step': attempt}), file=open(sys.argv[1], 'a'))\n"
        "raise RuntimeError(f'lost in attempt {attempt}')"
    )
    metrics = str(run_dir / "metrics.jsonl")
    job = submit(make_job(code, metrics, failures_in_a_row=2, **FIRST_NODE))
    log = run_dir / "launch" / f"{job}.log"
    wait_for_restart(job, run_dir, 1)
    wait_for_restart(job, run_dir, 2)
    wait_for(lambda: log.read_text().endswith("code 1: RuntimeError: lost in attempt 2\n"))
    assert log.read_text().count("trying again after this error:") == 2
    assert log.read_text().count("giving up after this error:") == 1


def test_the_first_error_is_ours_and_bad_input_is_not_tried_again(make_job, tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "other = Path(sys.argv[1])\n"
        "if os.environ['RANK'] == '0':\n"
        "    while not other.exists(): time.sleep(0.1)\n"
        "    raise RuntimeError('connection closed by peer')\n"
        "other.touch(); time.sleep(1)\n"
        "sys.exit(print('error: no such data', file=sys.stderr) or 2)"
    )
    script = make_job(code, str(tmp_path / "other"), **FIRST_NODES)
    exit_code, lines = run_to_end(script)
    assert exit_code == 2
    assert lines[-1] == "error: trainer on node2, rank 1, ended with code 2: no such data"
    exit_code, lines = run_to_end(script)  # as a continuation would
    assert exit_code == 1
    assert "not tried again" in lines[-1]


def test_a_killed_srun_ends_the_job_and_is_named(make_job, run_dir):
    job = submit(make_job("import time; time.sleep(300)", requeue=False))
    log = run_dir / "launch" / f"{job}.log"
    wait_for(lambda: list(run_dir.glob("launch/*/trainer-*.log")))

    ours = processes_with(f"{run_dir}/launch/snapshots/1/job.json")
    next(one for one in ours if one.info["cmdline"][0] == "srun").kill()
    begin = time.monotonic()
    wait_for(lambda: "error:" in log.read_text())
    assert time.monotonic() - begin < 20
    message = log.read_text().partition("error:")[2]
    assert "the srun of trainer was ended from outside" in message
    assert "killed by SIGKILL" in message


def test_a_job_whose_servers_are_told_to_end_before_they_answer_goes_on_later(
    no_job_is_left, run_dir
):
    job = submit(write_waiting_job(run_dir).snapshot / "job.sh")
    wait_for(lambda: list(run_dir.glob("launch/*/server-*.log")))
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    wait_for(lambda: outcomes(run_dir), 20)
    (outcome,) = outcomes(run_dir)
    assert outcome["code"] == 75
    log = run_dir / "launch" / f"{job}.log"
    wait_for(lambda: "told to end while it waited for the servers; goes on" in log.read_text(), 20)


def test_servers_that_do_not_answer_in_time_are_named_and_killed_if_they_do_not_end(
    no_job_is_left, run_dir, tmp_path
):
    stubborn = (
        "import signal, sys, time; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: Path(sys.argv[1]).touch())\n"
        "while True: time.sleep(300)"
    )
    told = tmp_path / "told"
    job = submit(write_waiting_job(run_dir, stubborn, str(told), deadline_s=8).snapshot / "job.sh")
    wait_for(lambda: outcomes(run_dir))
    (outcome,) = outcomes(run_dir)
    assert "the servers of node2 did not answer within 8 s" in outcome["message"]
    log = run_dir / "launch" / f"{job}.log"
    wait_for(lambda: outcome["message"] in log.read_text(), 20)
    assert told.exists()
    assert not processes_with(str(told))


def test_a_command_that_slurm_tells_to_end_before_its_parent_goes_on_later(run_dir, tmp_path):
    with start_role(run_dir, tmp_path) as parent:
        wait_for(lambda: psutil.Process(parent.pid).children())
        (child,) = psutil.Process(parent.pid).children()
        child.terminate()
        child.wait(20)
        parent.terminate()
        assert parent.wait(20) == 0
    assert json.loads((tmp_path / "ended" / "server-0.json").read_text())["code"] == 75


def test_a_task_that_slurm_tells_to_end_as_it_starts_its_command_goes_on_later(run_dir, tmp_path):
    told = (
        "import os, signal\n"
        "def tell():\n"
        "    for process in (os.getpid(), os.getppid()): os.kill(process, signal.SIGTERM)\n"
        "os.register_at_fork(after_in_child=tell)"
    )
    with start_role(run_dir, tmp_path, told) as parent:
        assert parent.wait(20) == 0
    assert json.loads((tmp_path / "ended" / "server-0.json").read_text())["code"] == 75


def test_a_conductor_that_is_told_to_end_does_not_wait_for_servers(run_dir):
    command = [sys.executable, "-m", "klear_megatron.launch.conductor"]
    path = write_waiting_job(run_dir).snapshot / "job.json"
    with subprocess.Popen([*command, str(path)], cwd=ROOT) as conductor:
        try:
            wait_for(lambda: list(run_dir.glob("launch/*/server-*.log")))
            conductor.terminate()
            assert conductor.wait(30) == 75
        finally:
            conductor.kill()


def test_a_cancelled_job_ends(make_job, run_dir):
    job = submit(make_job("import time; time.sleep(300)"))
    wait_for(lambda: list(run_dir.glob("launch/*/trainer-*.log")))
    assert job in cancel(run_dir)
    wait_for(lambda: "no job is waiting or running" in status(run_dir) or job in status(run_dir))
    wait_for(lambda: job not in queue())
    assert cancel(run_dir) == "no job is waiting or running"


def test_an_allocation_that_is_too_small_is_refused(make_job):
    script = make_job("pass")
    text = script.read_text().replace("--nodes=2", "--nodes=1")
    script.write_text(text)
    exit_code, lines = run_to_end(script)
    assert exit_code == 2
    assert lines[-1] == "error: the job has 1 nodes, but its layout needs 2"


def test_continuations_go_on_and_after_a_failure_nothing_follows(no_job_is_left, tmp_path):
    go_on = (
        "import sys; from pathlib import Path\n"
        "one = Path(sys.argv[1])\n"
        "sys.exit(0) if one.exists() else one.touch(); sys.exit(75)"
    )
    flags = {"nodes": 1, "requeue": False}
    first = write_job(tmp_path / "1", go_on, str(tmp_path / "one"), **flags, continuations=2)
    second = write_job(
        tmp_path / "2", go_on, str(tmp_path / "two"), **flags, continuations=1, singleton=True
    )
    third = write_job(tmp_path / "3", "raise ValueError('no')", **flags)
    fourth = write_job(tmp_path / "4", "pass", nodes=1)
    nemo_run(*(job.snapshot for job in (first, second, third, fourth)))
    shown = subprocess.check_output(["squeue", "--noheader", "--format=%j %E"], text=True)
    # What is fulfilled is not shown, such as that the first job of a name is a singleton.
    waits = [set(re.findall("after[a-z]+|singleton", line)) for line in shown.splitlines()]
    assert waits.count({"afterany", "singleton"}) == 1
    assert "Dependency" in status(tmp_path / "4")
    wait_for(lambda: "no job is waiting or running" in status(tmp_path / "4"))
    codes = [
        [outcome["code"] for outcome in sorted(outcomes(run), key=lambda outcome: outcome["time"])]
        for run in (tmp_path / name for name in "1234")
    ]
    assert codes == [[75, 0], [75, 0], [1], []]
    (last,) = [
        log for log in (tmp_path / "1").glob("launch/*.log") if "nothing to do" in log.read_text()
    ]
    assert "finished by an earlier job" in last.read_text()


def test_the_jobs_of_an_array_run_at_once_on_one_node(no_job_is_left, tmp_path):
    meet = (
        "import os, sys, time; from pathlib import Path\n"
        "mine, other = sys.argv[1:]\n"
        "Path(mine).write_text(os.environ['MASTER_PORT'])\n"
        "while not Path(other).exists(): time.sleep(0.1)"
    )
    names = [str(tmp_path / name) for name in ("port-a", "port-c")]
    flags = {"nodes": 1, "sbatch_flags": ("--nodelist=node3",), "ports": (6990, 6991)}
    jobs = [
        write_job(tmp_path / "1", meet, *names, **flags),
        write_job(tmp_path / "2", meet, *names[::-1], **flags),
    ]
    nemo_run(write_array(jobs))
    wait_for(lambda: all((job.snapshot / "finished").exists() for job in jobs))
    assert sorted(Path(name).read_text() for name in names) == ["6990", "6991"]
    for index, job in enumerate(jobs):
        (log,) = job.run_dir.glob("launch/*.log")
        assert log.stem.endswith(f"_{index}")
        (attempt,) = job.run_dir.glob("launch/*/outcome.json")
        assert attempt.parent.name == f"{log.stem}-0"


def test_a_heterogeneous_job_has_trainer_and_servers_in_components_of_their_own(
    no_job_is_left, run_dir, tmp_path
):
    paper = ROOT / "examples" / "klear_reasoner_8b" / "math_rl.yaml"
    config = load_config(RLConfig, paper, [f"--run_dir={run_dir}"])
    train = (
        "import os, sys; from pathlib import Path\n"
        "Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'] + sys.argv[3])"
    )
    serve = (
        "import json, signal, sys, time; from pathlib import Path\n"
        "values = dict(word[2:].split('=', 1) for word in sys.argv[2:])\n"
        "def told(*_): Path(sys.argv[1], 'told').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "announce = Path(json.loads(values['announce']))\n"
        "announce.with_suffix('.part').write_text('[\"http://here:1\"]')\n"
        "announce.with_suffix('.part').rename(announce)\n"
        "time.sleep(300)"
    )
    job = write_job(
        run_dir,
        train,
        str(tmp_path),
        config=config,
        verb="rl",
        servers={"nodes": 1},
        heterogeneous=True,
        requeue=False,
    )
    edit_job(job, "servers", serve, str(tmp_path))
    nemo_run(job.snapshot)
    wait_for(lambda: outcomes(run_dir))
    assert [(outcome["code"], outcome["message"]) for outcome in outcomes(run_dir)] == [(0, "")]
    for rank in "01":
        assert (tmp_path / rank).read_text() == '2["http://here:1"]'
    assert (tmp_path / "told").exists()  # SIGTERM reached the other component
    (attempt,) = run_dir.glob("launch/*/attempt.json")
    nodes = list(json.loads(attempt.read_text())["addresses"])
    logs = {log.stem for log in attempt.parent.glob("*-node*.log")}
    assert logs >= {f"trainer-{nodes[0]}", f"trainer-{nodes[1]}", f"server-{nodes[2]}"}


def test_a_node_without_the_interpreter_is_named(make_job):
    exit_code, lines = run_to_end(make_job("pass", nodes=1, python="/no/such/python"))
    assert exit_code == 2
    assert lines[-1].startswith("error: ")
    assert lines[-1].endswith("/no/such/python is not there; every node needs it")


def test_nodes_that_are_not_fit_are_named(make_job, run_dir, tmp_path):
    """The second does not see the run directory, and the third has no environment."""
    packages = Path(sys.prefix).resolve() / "lib"  # .venv may be a link
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
declare -A hidden=([node2]={shlex.quote(str(run_dir))} [node3]={shlex.quote(str(packages))})
hide=${{hidden[$SLURMD_NODENAME]}}
[ $SLURMD_NODENAME = node2 ] || sleep 1  # it is the first to fail
exec bwrap --dev-bind / / ${{hide:+--tmpfs "$hide"}} {shlex.quote(sys.executable)} "$@"
"""
    )
    python.chmod(0o755)
    flags = ("--nodelist=node1,node2,node3",)
    script = make_job("pass", nodes=3, sbatch_flags=flags, python=python, requeue=False)
    exit_code, lines = run_to_end(script)
    assert exit_code == 1
    said = "\n".join(lines).partition("error: a node is not fit for the job:\n")[2]
    assert f"node2: cannot run {python}, or does not see {run_dir}" in said
    assert f"node3: {sys.executable} has no torch" in said
    assert "node1" not in said
