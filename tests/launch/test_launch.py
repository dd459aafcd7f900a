"""`klear-megatron launch`: what it prints, what it refuses, and a whole run on a real Slurm."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from klear_megatron.cli import main
from tests.commands import ROOT, prepare_quickstart, run_command
from tests.launch.test_conductor import wait_for

PAPER = str(ROOT / "examples" / "klear_reasoner_8b" / "math_rl.yaml")


@pytest.fixture
def rl_config(tmp_path: Path) -> Path:
    """Two steps of the quickstart's reinforcement learning on two nodes, and a rollout node."""
    prepare_quickstart(tmp_path / "quickstart")
    text = (ROOT / "examples" / "quickstart" / "rl.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text.replace("runs", str(tmp_path)))
    values |= {"steps": 2, "prompts_per_step": 4, "responses_per_prompt": 2}
    values |= {"prompts_per_mini_batch": 2, "save_every": 1}
    values["policy"]["path"] = str(tmp_path / "quickstart" / "base")
    values["sampling"]["max_response_length"] = 8
    values["launch"] = {
        "verb": "rl",
        "nodes": 2,
        "cpus_per_rank": 1,
        "servers": {"nodes": 1, "deadline_s": 200},
        "time": "00:10:00",
        "requeue": False,
    }
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def finish(run_dir: Path, timeout: float) -> dict[str, Any]:
    """Waits until the newest attempt has ended, and returns how."""
    wait_for(lambda: list(run_dir.glob("launch/*/outcome.json")), timeout)
    (outcome,) = run_dir.glob("launch/*/outcome.json")
    ended: dict[str, Any] = json.loads(outcome.read_text())
    return ended


def test_gppo_on_two_trainer_nodes_and_a_rollout_node(slurm_conf, rl_config, tmp_path):
    """Submitted by the real nemo-run."""
    run_dir = tmp_path / "quickstart" / "rl"
    launched = run_command("launch", str(rl_config))
    assert launched.returncode == 0, launched.stderr
    assert finish(run_dir, 300) | {"time": 0} == {"code": 0, "message": "", "time": 0}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    (server,) = run_dir.glob("launch/*/servers/*.json")
    (attempt,) = run_dir.glob("launch/*/attempt.json")
    assert json.loads(server.read_text()) == json.loads(attempt.read_text())["urls"]
    nodes = {log.stem for log in attempt.parent.glob("*-node*.log")}
    assert len(nodes) == 3
    (snapshot,) = run_dir.glob("launch/snapshots/*")
    assert (snapshot / "finished").exists()
    assert json.loads((snapshot / "code.json").read_text())["version"]


def test_a_server_that_does_not_start_ends_the_job_and_is_named(slurm_conf, rl_config, tmp_path):
    flags = ["--rollout.extra_args", "[--no-such-flag]"]
    launched = run_command("launch", str(rl_config), *flags)
    assert launched.returncode == 0, launched.stderr
    outcome = finish(tmp_path / "quickstart" / "rl", 120)
    assert outcome["code"] == 2
    assert "server on node" in outcome["message"]
    assert "--no-such-flag" in outcome["message"]


def test_a_partition_that_slurm_does_not_have_is_named(slurm_conf, rl_config):
    refused = run_command("launch", str(rl_config), "--launch.partition", "gone")
    assert refused.returncode == 2
    assert "invalid partition" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_dry_run_prints_a_script_for_bash_and_the_arithmetic(capsys):
    assert main(["launch", PAPER, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    checked = subprocess.run(["bash", "-n"], input=printed.partition("\n\n")[0], text=True)
    assert checked.returncode == 0
    for line in (
        "#SBATCH --nodes=32",
        "  node 7: trainer, ranks 56 to 63",
        "  node 31: 8 SGLang servers of 1 GPUs",
        "64 ranks = TP 2 x PP 1 x CP 4 x DP 8",
    ):
        assert line in printed.splitlines()
    assert "= 128 sequences / DP 8 = 16 per data-parallel rank" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy.parallel.context_parallel_size", "5"], "world size 64 is not divisible"),
        (["--launch.servers.per_node", "9"], "a node has 8 (launch.gpus_per_node)"),
        (["--save_every", "null"], "a requeued job would begin anew each time"),
        (["--launch.tiem", "1:00"], "tiem: unknown key"),
        (["--launch.time", "00:05:00"], "would be told to end as soon as it begins"),
        (["--launch.time", "12:00:00"], "put the time in quotes"),
        (["--launch.time", "soon"], "'soon' is not a time"),
        (["--launch.secrets", "[NO_SUCH_SECRET]"], "NO_SUCH_SECRET is not set in your shell"),
    ],
)
def test_bad_input_is_refused_before_anything_is_submitted(flags, message, tmp_path, capsys):
    assert main(["launch", PAPER, "--run_dir", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_site_file_that_does_not_fit_is_named(tmp_path, capsys):
    site = tmp_path / "site.yaml"
    site.write_text("partition: batch\ngres: gpu:8\ngpus_per_node: 8\n")
    assert main(["launch", PAPER, "--site", str(site), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {site}:")
    assert "request the same GPUs" in error


def test_a_job_runs_on_this_host_without_slurm(tmp_path):
    """Submitted by the real nemo-run, with its local executor."""
    out = tmp_path / "out"
    prepare_quickstart(tmp_path)
    config = tmp_path / "convert.yaml"
    arguments = [str(tmp_path / "base"), str(out)]
    values = {
        "run_dir": str(tmp_path / "run"),
        "launch": {"verb": "convert", "arguments": arguments, "python": sys.executable},
    }
    config.write_text(yaml.safe_dump(values))
    done = run_command("launch", str(config), "--executor", "local")
    assert done.returncode == 0, done.stderr
    assert (out / "latest_checkpointed_iteration.txt").exists() or list(out.iterdir())
    assert finish(tmp_path / "run", 1)["code"] == 0
