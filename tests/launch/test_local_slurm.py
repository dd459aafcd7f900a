"""The local Slurm places steps, counts GPUs and delivers signals as a cluster's does."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.commands import ROOT
from tests.launch.conftest import LOCAL_SLURM, wait_for

DISJOINT_STEPS = """#!/bin/bash
#SBATCH --nodes=3 --ntasks-per-node=2 --gpus-per-node=8
cd {folder}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
step() {{ timeout 100 srun --exact --output="$1" "${{@:2}}"; }}
# Not --relative: it only leaves out the nodes before, and takes any of the others.
step trainer --nodes=2 --ntasks=4 --nodelist="${{nodes[0]}},${{nodes[1]}}" \\
    --gpus-per-node=8 bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME' &
step servers --nodes=1 --ntasks=1 --nodelist="${{nodes[2]}}" \\
    --gpus-per-node=4 bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME' &
wait
"""

TOLD_TO_END = """#!/bin/bash
cd {folder}
timeout 100 srun --output=step bash -c 'trap "echo told to end; exit 75" TERM
touch started; while :; do sleep 0.1; done' &
until [ -e started ]; do sleep 0.1; done
scancel --signal=TERM "$SLURM_JOB_ID"
wait $!
echo $? >code
"""


def submit(script: str, folder: Path) -> None:
    path = folder / "job.sh"
    path.write_text(script.format(folder=folder))
    command = ["sbatch", "--wait", f"--output={folder}/batch", str(path)]
    subprocess.run(command, check=True, timeout=120)


def refusal(folder: Path, *flags: str) -> str:
    """What sbatch answers to a job that it must not take."""
    command = ["sbatch", *flags, "--wrap=true", f"--output={folder}/batch"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1
    return answer.stderr


def test_steps_of_one_job_have_nodes_of_their_own(slurm_conf, tmp_path):
    submit(DISJOINT_STEPS, tmp_path)
    trainer = sorted(line.split() for line in (tmp_path / "trainer").read_text().splitlines())
    ranks, nodes = zip(*trainer, strict=True)
    rank, server_node = (tmp_path / "servers").read_text().split()
    assert ranks == ("0", "1", "2", "3")
    assert rank == "0"
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert server_node not in nodes


def test_term_reaches_the_steps_and_not_the_batch_shell(slurm_conf, tmp_path):
    submit(TOLD_TO_END, tmp_path)
    assert "told to end" in (tmp_path / "step").read_text()
    assert (tmp_path / "code").read_text() == "75\n"  # so the batch shell lived on


def test_a_partition_that_is_not_there_is_refused(slurm_conf, tmp_path):
    assert "invalid partition" in refusal(tmp_path, "--partition=gone")


def test_more_gpus_than_a_node_has_are_refused(slurm_conf, tmp_path):
    assert "configuration is not available" in refusal(tmp_path, "--gpus-per-node=9")


def _sleepers(conf: str) -> list[psutil.Process]:
    """The job's processes on this Slurm."""
    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error):
            if process.info["name"] == "sleep" and process.environ().get("SLURM_CONF") == conf:
                found.append(process)
    return found


def _daemons_and_a_job(folder: str) -> list[psutil.Process]:
    """All processes of a Slurm of two nodes, which gets a job."""
    conf = str(Path(folder, "slurm.conf"))
    pids = [int(path.read_text()) for path in Path(folder, "run").glob("*.pid")]
    assert len(pids) == 4  # munged, slurmctld and two slurmd
    daemons = [psutil.Process(pid) for pid in pids]
    job = ["sbatch", "--wrap=sleep 300", f"--output={folder}/batch"]
    subprocess.run(job, check=True, timeout=60, env={**os.environ, "SLURM_CONF": conf})
    wait_for(lambda: _sleepers(conf))
    children = [child for daemon in daemons for child in daemon.children(recursive=True)]
    return [*daemons, *children, *_sleepers(conf)]


def test_down_leaves_no_process():
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        subprocess.run([LOCAL_SLURM, "up", folder, "2"], check=True, timeout=120)
        processes = _daemons_and_a_job(folder)
        subprocess.run([LOCAL_SLURM, "down", folder], check=True, timeout=60)
        _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_a_slurm_whose_starter_is_killed_leaves_no_process():
    code = (
        "import sys, time; from tests.launch.conftest import local_slurm\n"
        "with local_slurm(sys.argv[1], '2'): print(flush=True); time.sleep(300)"
    )
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        command = [sys.executable, "-c", code, folder]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as starter:
            assert starter.stdout is not None
            starter.stdout.readline()
            holder = psutil.Process(starter.pid).children(recursive=True)
            processes = [*_daemons_and_a_job(folder), *holder]
            starter.kill()
        _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
