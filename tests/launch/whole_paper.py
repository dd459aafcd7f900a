"""The recipe of the whole paper with a tiny model: its configs, and how it is submitted.

Code RL gets the servers of another job, runs out of time while it draws responses, and goes on in a
continuation. A model this small writes no programs, so programs are made of what it says.
"""

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.cli import main
from tests.commands import ROOT, environment

NEMO_RUN_PYTHON = str(ROOT / ".venv-launch" / "bin" / "python")
RECIPE = str(ROOT / "examples" / "slurm" / "klear_reasoner.py")
ROLLOUT = {
    "dtype": "float32",
    "mem_fraction_static": 0.1,
    "max_running_requests": 16,
    "context_length": 256,
    "extra_args": ["--max-total-tokens", "4096"],
}


def write_configs(folder: Path, quickstart: Path) -> Path:
    """A tiny config of every stage, and of a job that serves."""
    runs = folder / "runs"
    rows = (quickstart / "train.jsonl").read_text().splitlines()[:16]
    (folder / "raw.jsonl").write_text("\n".join([*rows, *rows]))
    with (quickstart / "sft.jsonl").open() as file:
        (folder / "sft.jsonl").write_text("".join(itertools.islice(file, 16)))
    problems = {"path": str(folder / "prompts.jsonl"), "max_prompt_length": 64}
    sampling = {"temperature": 1.0, "max_response_length": 8}
    tests = json.dumps({"inputs": [""], "outputs": ["0"]})
    code = {"data_source": "code", "reward_model": {"ground_truth": tests}}
    coding = [json.dumps(json.loads(row) | code) for row in rows]
    (folder / "raw_code.jsonl").write_text("\n".join(coding))
    job = {"cpus_per_rank": 1, "requeue": False}

    def curate(name: str, path: str, output: str) -> dict[str, Any]:
        return {
            "path": str(folder / path),
            "output": str(folder / output),
            "launch": job | {"verb": "curate", "run_dir": str(runs / name)},
        }

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
        "curate_math": curate("curate_math", "raw.jsonl", "prompts.jsonl"),
        "curate_code": curate("curate_code", "raw_code.jsonl", "coding.jsonl"),
        "sft": {
            "run_dir": str(runs / "sft"),
            "policy": policy(quickstart / "base"),
            "data": {"path": str(folder / "sft.jsonl"), "max_length": 256},
            "batch_size": 8,
            "launch": job | {"verb": "sft"},
        },
        "math_rl": rl("sft-hf", "math_rl", 2, nodes=2, servers={"nodes": 1}),
        "code_rl": rl(
            "math_rl-hf",
            "code_rl",
            2,
            servers={"run": str(runs / "serve")},
            environment={"RUNS": str(runs)},
            continuations=1,
        )
        | {
            "data": {**problems, "path": str(folder / "coding.jsonl")},
            "save_every": 2,
            # One group is drawn after the other, so the first is graded while others are left.
            "prompts_per_step": 8,
            "rollout": ROLLOUT | {"max_running_requests": 2},
            "rewards": {
                "custom": [{"function": "tests.launch.out_of_time:even_in_the_sandbox"}],
                "workers": 1,
            },
        },
        "eval": {
            "model": str(runs / "code_rl-hf"),
            "run_dir": str(runs / "eval"),
            "benchmarks": {"heldout": problems | {"path": str(folder / "raw.jsonl")}},
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
    configs = folder / "configs"
    configs.mkdir()
    for name, values in stages.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return configs


def submit_all(folder: Path, quickstart: Path) -> Path:
    """Submits the job that serves and the recipe's; returns the folder of their run directories."""
    configs, runs = write_configs(folder, quickstart), folder / "runs"
    assert main(["launch", str(configs / "serve.yaml")]) == 0
    submitted = subprocess.run(
        [NEMO_RUN_PYTHON, RECIPE, "--configs", str(configs), "--runs", str(runs)],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stderr
    return runs
