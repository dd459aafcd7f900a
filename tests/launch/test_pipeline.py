"""The recipe of the whole paper, with a tiny model, on a real Slurm through the real nemo-run."""

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import ROOT, environment, run_command
from tests.launch.conftest import wait_for

NEMO_RUN_PYTHON = str(ROOT / ".venv-launch" / "bin" / "python")
RECIPE = str(ROOT / "examples" / "slurm" / "klear_reasoner.py")
ROLLOUT = {
    "dtype": "float32",
    "mem_fraction_static": 0.1,
    "max_running_requests": 16,
    "context_length": 256,
    "extra_args": ["--max-total-tokens", "4096"],
}


@pytest.fixture
def configs(quickstart: Path, tmp_path: Path) -> Path:
    """A tiny config of every stage, and of a job that serves."""
    runs = tmp_path / "runs"
    rows = (quickstart / "train.jsonl").read_text().splitlines()[:16]
    (tmp_path / "raw.jsonl").write_text("\n".join([*rows, *rows]))
    with (quickstart / "sft.jsonl").open() as file:
        (tmp_path / "sft.jsonl").write_text("".join(itertools.islice(file, 16)))
    problems = {"path": str(tmp_path / "prompts.jsonl"), "max_prompt_length": 64}
    sampling = {"temperature": 1.0, "max_response_length": 8}
    job = {"cpus_per_rank": 1, "requeue": False}

    def policy(base: Path) -> dict[str, Any]:
        return {"path": str(base), "dtype": "float32", "optimizer": {"lr": 1e-4}}

    def rl(base: str, name: str, steps: int, **launch: Any) -> dict[str, Any]:
        return {
            "run_dir": str(runs / name),
            "policy": policy(runs / base),
            "data": problems,
            "steps": steps,
            "save_every": 1,
            "prompts_per_step": 4,
            "responses_per_prompt": 2,
            "prompts_per_mini_batch": 2,
            "sampling": sampling,
            "rollout": ROLLOUT,
            "rewards": {"custom": [{"function": "tests.even_reward:even"}], "workers": 1},
            "launch": job | {"verb": "rl"} | launch,
        }

    stages = {
        "curate": {
            "path": str(tmp_path / "raw.jsonl"),
            "output": problems["path"],
            "launch": job | {"verb": "curate", "run_dir": str(runs / "curate")},
        },
        "sft": {
            "run_dir": str(runs / "sft"),
            "policy": policy(quickstart / "base"),
            "data": {"path": str(tmp_path / "sft.jsonl"), "max_length": 256},
            "batch_size": 8,
            "launch": job | {"verb": "sft"},
        },
        "math_rl": rl("sft-hf", "math_rl", 2, nodes=2, servers={"nodes": 1}),
        "code_rl": rl("math_rl-hf", "code_rl", 1, servers={"run": str(runs / "serve")}),
        "eval": {
            "model": str(runs / "code_rl-hf"),
            "run_dir": str(runs / "eval"),
            "benchmarks": {"heldout": problems | {"path": str(tmp_path / "raw.jsonl")}},
            "sampling": sampling,
            "rollout": ROLLOUT,
            "launch": job | {"verb": "eval"},
        },
        "serve": {
            "model": str(quickstart / "base"),
            "run_dir": str(runs / "serve"),
            "rollout": ROLLOUT,
            "launch": job | {"verb": "serve"},
        },
    }
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, values in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_from_a_base_model_to_a_released_folder(slurm_conf, configs, tmp_path):
    """Math RL has two trainer nodes and a rollout node; code RL uses the servers of another job."""
    runs = tmp_path / "runs"
    served = run_command("launch", str(configs / "serve.yaml"))
    assert served.returncode == 0, served.stderr
    command = [NEMO_RUN_PYTHON, RECIPE, "--configs", str(configs), "--runs", str(runs)]
    submitted = subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stderr

    def ended() -> bool:
        outcomes = [json.loads(file.read_text()) for file in runs.glob("*/launch/*/outcome.json")]
        assert not [outcome for outcome in outcomes if outcome["code"]]
        return len(outcomes) == 9

    wait_for(ended, 400)
    released = runs / "Klear-Reasoner-8B"
    assert {"README.md", "SHA256SUMS", "model.safetensors"} <= {
        file.name for file in released.iterdir()
    }
    assert json.loads((runs / "eval" / "results.json").read_text())
    for name, steps in (("math_rl", [1, 2]), ("code_rl", [1])):
        rows = (runs / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == steps
    nodes = {log.stem for log in (runs / "math_rl").glob("launch/*/*-node*.log")}
    assert len(nodes) == 3
    for name, serving in (("math_rl", "math_rl"), ("code_rl", "serve")):
        (attempt,) = (runs / name).glob("launch/*/attempt.json")
        (registered,) = (runs / serving).glob("launch/*/servers/*.json")
        assert json.loads(attempt.read_text())["urls"] == json.loads(registered.read_text())
    (snapshot,) = (runs / "math_rl").glob("launch/snapshots/*")
    assert json.loads((snapshot / "code.json").read_text())["version"]
    cancelled = run_command("cancel", str(runs / "serve"))
    assert cancelled.stdout.startswith("cancelled"), cancelled.stderr
