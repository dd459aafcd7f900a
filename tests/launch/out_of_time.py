"""A reward that lets its job run out of time while the second step is drawn."""

import json
import os
import subprocess
from pathlib import Path

import httpx

from klear_megatron.rewards import Reward
from klear_megatron.rewards.code import code_reward


def even_in_the_sandbox(response: str, ground_truth: str, data_source: str) -> Reward:
    """A program in the sandbox says whether the response's length is even, as about half are."""
    runs = Path(os.environ["RUNS"])
    metrics = runs / "code_rl" / "metrics.jsonl"
    one_step_is_done = metrics.exists() and metrics.stat().st_size
    if one_step_is_done and not (runs / "out_of_time").exists():
        (runs / "out_of_time").touch()
        let_time_run_out(runs / "serve" / "launch")
    program = f"print(len('{response.encode(errors='replace').hex()}') // 2 % 2)"
    graded = code_reward(f"<think>\n</think>\n```python\n{program}\n```", ground_truth)
    return Reward(score=graded.score, correct=graded.correct, formatted=True)


def let_time_run_out(served: Path) -> None:
    """Has the server draw nothing more until it gets new weights, and Slurm see a near time limit.

    Slurm looks at time limits every 30 seconds.
    """
    (answering,) = (served / (served / "newest").read_text()).glob("servers/*.json")
    (url,) = json.loads(answering.read_text())
    paused = httpx.post(f"{url}/pause_generation", json={"mode": "retract"}, timeout=30)
    paused.raise_for_status()
    limit = ["scontrol", "update", f"JobId={os.environ['SLURM_JOB_ID']}", "TimeLimit=5"]
    subprocess.run(limit, check=True)
