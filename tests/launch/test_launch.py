"""`klear-megatron launch`: what it prints, what it refuses, and a whole run on a real Slurm."""

import json
import re
import runpy
import secrets
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from klear_megatron.cli import main
from klear_megatron.launch.reports import read_reports
from tests.commands import ROOT
from tests.launch.conftest import wait_for
from tests.models.published import qwen3_8b

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
PAPER = str(ROOT / "examples" / "klear_reasoner_8b" / "math_rl.yaml")


@pytest.fixture
def rl_config(tmp_path: Path, quickstart: Path) -> Path:
    """Two steps of the quickstart's reinforcement learning on two nodes, and a rollout node."""
    text = (ROOT / "examples" / "quickstart" / "rl.yaml").read_text()
    values: dict[str, Any] = yaml.safe_load(text.replace("runs", str(tmp_path)))
    values |= {"steps": 2, "prompts_per_step": 4, "responses_per_prompt": 2}
    values |= {"prompts_per_mini_batch": 2, "save_every": 1}
    values["policy"]["path"] = str(quickstart / "base")
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


def test_a_server_that_does_not_start_ends_the_job_and_is_named(
    slurm_conf, beside_the_pipeline, rl_config, tmp_path
):
    flags = ["--rollout.extra_args", "[--no-such-flag]"]
    assert main(["launch", str(rl_config), *flags]) == 0
    outcome = finish(tmp_path / "quickstart" / "rl", 120)
    assert outcome["code"] == 2
    assert "server on node" in outcome["message"]
    assert "--no-such-flag" in outcome["message"]
    (attempt,) = tmp_path.glob("quickstart/rl/launch/*-0")
    (dead,) = read_reports(attempt, "server")
    assert outcome["time"] - dead.time < 60


def test_a_partition_that_slurm_does_not_have_is_named(slurm_conf, rl_config, capfd):
    assert main(["launch", str(rl_config), "--launch.partition", "gone"]) == 2
    error = capfd.readouterr().err
    assert "invalid partition" in error
    assert "Traceback" not in error


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


def test_every_config_of_the_whole_papers_recipe_is_there_and_good(capsys):
    recipe = runpy.run_path(str(ROOT / "examples" / "slurm" / "klear_reasoner.py"))
    stages = recipe["stages"](Path(PAPER).parent, Path("runs"))
    configs = [str(stage) for stage in stages.values() if isinstance(stage, Path)]
    assert len(configs) == 6
    assert main(["launch", *configs, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("#!/bin/bash") == 6


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


def test_what_a_site_asks_for_is_in_the_script(tmp_path, capsys):
    site = tmp_path / "site.yaml"
    values = {
        "account": "reasoning",
        "partition": "long",
        "qos": "high",
        "gres": "gpu:h100:8",
        "grace_s": 120,
        "setup": ["module load 'cuda/13.0'"],
        "sbatch_flags": ["--comment=two $words", "--contiguous"],
    }
    site.write_text(yaml.safe_dump(values))
    flags = ["--site", str(site), "--dry-run", "--launch.gpus_per_node", "null"]
    assert main(["launch", PAPER, *flags]) == 0
    printed = capsys.readouterr().out
    asked = [shlex.split(line)[1] for line in printed.splitlines() if line.startswith("#SBATCH")]
    assert {
        *("--account=reasoning", "--partition=long", "--qos=high", "--gres=gpu:h100:8"),
        *("--signal=TERM@120", "--requeue", "--open-mode=append"),
        *("--comment=two $words", "--contiguous"),
    } <= set(asked)
    assert not any(flag.startswith("--gpus-per-node") for flag in asked)
    assert "module load 'cuda/13.0'" in printed.splitlines()


@pytest.mark.parametrize(
    ("flags", "connections"),
    [
        ([], "1"),
        (["--launch.gpu", "blackwell"], None),
        (["--policy.parallel", "{}"], None),
        (["--launch.environment", json.dumps({CONNECTIONS: "8"})], "8"),
    ],
)
def test_ranks_have_the_recipes_variables_unless_the_run_sets_others(
    flags, connections, tmp_path, capsys
):
    assert main(["launch", PAPER, "--run_dir", str(tmp_path), "--prepare", *flags]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    job = json.loads((folder / "job.json").read_text())
    ranks, servers = job["main"]["environment"], job["servers"]["environment"]
    assert ranks.get(CONNECTIONS) == connections
    assert ranks["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in servers


def test_a_job_runs_on_this_host_without_slurm(quickstart, tmp_path):
    """Submitted by the real nemo-run, with its local executor."""
    out = tmp_path / "out"
    config = tmp_path / "convert.yaml"
    arguments = [str(quickstart / "base"), str(out)]
    values = {
        "launch": {
            "verb": "convert",
            "arguments": arguments,
            "run_dir": str(tmp_path / "run"),
            "python": sys.executable,
        }
    }
    config.write_text(yaml.safe_dump(values))
    assert main(["launch", str(config), "--executor", "local"]) == 0
    assert (out / "latest_checkpointed_iteration.txt").exists() or list(out.iterdir())
    assert finish(tmp_path / "run", 1)["code"] == 0


def test_an_array_is_of_jobs_that_ask_for_the_same(tmp_path, capsys):
    other = tmp_path / "other.yaml"
    values = yaml.safe_load(Path(PAPER).read_text()) | {"run_dir": str(tmp_path / "other")}
    other.write_text(yaml.safe_dump(values))
    assert main(["launch", PAPER, str(other), "--array", "--dry-run"]) == 0
    script = capsys.readouterr().out.partition("exec bash")[0]
    assert "#SBATCH --array=0-1" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    values["launch"]["time"] = "05:00:00"
    other.write_text(yaml.safe_dump(values))
    assert main(["launch", PAPER, str(other), "--array", "--dry-run"]) == 2
    assert "--time is 04:00:00 and 05:00:00" in capsys.readouterr().err
    assert main(["launch", PAPER, PAPER, "--dry-run"]) == 2
    assert "have the same run directory" in capsys.readouterr().err


def test_points_of_a_scaling_experiment_are_arrays_by_their_size(tmp_path, capsys):
    experiment = ROOT / "examples" / "long_context" / "h100_8b.yaml"
    model = tmp_path / "model"
    qwen3_8b(1048576).save_pretrained(model)
    layouts = json.dumps({"small": {"ranks": 4}, "two": {"ranks": 16}, "four": {"ranks": 32}})
    flags = ["--policy.path", str(model), "--layouts", layouts, "--run_dir", str(tmp_path / "run")]
    command = ["launch", str(experiment), *flags, "--lengths", "[1024, 2048]", "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    arrays = printed.split("#SBATCH --array=0-5\n")
    assert [re.findall(r"--(n\S+)", array)[-2:] for array in arrays[:-1]] == [
        ["nodes=1", "ntasks-per-node=4"],
        ["nodes=2", "ntasks-per-node=8"],
        ["nodes=4", "ntasks-per-node=8"],
    ]
    assert "16 ranks = TP 1" in printed
    command[4:6] = ["--layouts", json.dumps({"odd": {"ranks": 12}})]
    assert main(command) == 2
    assert "12 ranks do not fill nodes of 8" in capsys.readouterr().err


def test_a_scaling_experiment_runs_as_an_array_and_a_point_out_of_time_is_a_result(
    slurm_conf, beside_the_pipeline, quickstart, tmp_path, capsys
):
    config, run_dir = tmp_path / "scaling.yaml", tmp_path / "run"
    values = {
        "run_dir": str(run_dir),
        "policy": {"path": str(quickstart / "base"), "dtype": "float32", "optimizer": {"lr": 1e-3}},
        "lengths": [64],
        "layouts": {"one": {"ranks": 1}},
        "variants": {"base": {}, "stuck": {"imports": ["tests.launch.stuck"]}},
        "tokens_per_step": 64,
        "steps": 1,
        "time_limit_s": 20,
        "launch": {"verb": "scaling", "cpus_per_rank": 1},
    }
    config.write_text(yaml.safe_dump(values))
    assert main(["launch", str(config)]) == 0
    for variant, outcome in (("base", "measured"), ("stuck", "out of time")):
        point = run_dir / "points" / f"64.one.{variant}"
        ended = finish(point, 120)
        assert ended["code"] == (0 if outcome == "measured" else 2)
        assert json.loads(point.with_name(f"{point.name}.json").read_text())["outcome"] == outcome
    assert main(["launch", str(config)]) == 2
    assert "every point has a result" in capsys.readouterr().err
    assert main(["scaling", str(config), "--tables"]) == 0
    assert "stuck: out of time" in (run_dir / "summary.md").read_text()


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_variables_of_the_job_prevail_over_those_of_an_image(runtime, tmp_path, capsys):
    site = tmp_path / "site.yaml"
    value = secrets.token_hex()
    container = {"runtime": runtime, "image": "an image.sif", "mounts": ["/data:/data"]}
    site.write_text(yaml.safe_dump({"container": container, "secrets": ["A_TOKEN"]}))
    run_dir = tmp_path / "run"
    flags = ["--site", str(site), "--run_dir", str(run_dir), "--launch.python", "/opt/python"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TOKEN", value)
        assert main(["launch", PAPER, "--prepare", *flags]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    script, job = (folder / "job.sh").read_text(), json.loads((folder / "job.json").read_text())
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0
    assert "exec python3 -m klear_megatron.launch.conductor" in script  # outside the image
    assert job["main"]["command"][0] == "/opt/python"
    mounts = [f"{ROOT}:{ROOT}", f"{run_dir}:{run_dir}", f"{ROOT}:{ROOT}", "/data:/data"]
    if runtime == "pyxis":
        assert job["prefix"] == []
        for flag in (
            "--container-image=an image.sif",
            f"--container-mounts={','.join(mounts)}",
            "--container-env=PYTHONPATH,A_TOKEN",
        ):
            assert flag in job["srun_flags"]
    else:
        binds = [word for mount in mounts for word in ("--bind", mount)]
        assert job["prefix"] == [
            *["apptainer", "exec", "--nv", *binds, "--pwd", str(ROOT), "an image.sif"]
        ]
        assert 'export APPTAINERENV_A_TOKEN="$A_TOKEN"' in script.splitlines()
    code = json.loads((folder / "code.json").read_text())
    assert (
        code["commit"] == subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    )
    assert code["dirty"] == (folder / "changes.diff").exists()
    written = [file.read_text() for file in folder.rglob("*") if file.is_file()]
    assert not any(value in text for text in written)
