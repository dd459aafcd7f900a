"""Measures RL steps with max_staleness 0 and 1, the trainer on one core and the server on another.

    .venv/bin/python -m tools.benchmark_async [--steps N] [--prompts N] [--length N]

For a reward that answers at once and one that takes a second, as a remote judge does, prints the
median seconds of a step with each max_staleness, and what bounds a step from below: the longer of
`generate + grade` and `log-probs + train + push` with max_staleness 0. Ratios count, as all numbers
are of one run. Beside the step with max_staleness 1 stands what `rollout_simulation` predicts from
the parts of a step with 0. Needs Linux and the rollout environment (`make setup`).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from klear_megatron.rollout import RolloutConfig, serving
from klear_megatron.rollout.dispatch import Capacity
from tools.rollout_simulation import Scenario, simulate
from tools.simulated_server import Speed

ROOT = Path(__file__).parents[1]
WARM_UP = 3
"""Steps that do not count."""
STEP_S, SEQUENCE_S = 2.1e-3, 0.15e-3
"""A decode step of a tiny model on one core, and its share per sequence, up to a factor: a server
made 450 tokens/s of one sequence and 4,500 of 32."""
REWARDS = """
import asyncio

def score(response):
    return float(len(response) % 2)

def at_once(response, ground_truth, data_source):
    return score(response)

async def after_a_second(response, ground_truth, data_source):
    await asyncio.sleep(1.0)
    return score(response)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--length", type=int, default=100)
    arguments = parser.parse_args()
    trainer_core, server_core = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = ROOT / "examples" / "quickstart" / "prepare.py"
        subprocess.run([sys.executable, prepare, folder], check=True, stdout=subprocess.DEVNULL)
        (folder / "rewards.py").write_text(REWARDS)
        settings = yaml.safe_load((ROOT / "examples" / "quickstart" / "rl.yaml").read_text())
        rollout = RolloutConfig.model_validate(settings["rollout"])
        os.sched_setaffinity(0, {server_core})  # what is started now inherits it
        with serving(rollout, folder / "base", folder) as servers:
            os.sched_setaffinity(0, {trainer_core})
            for reward in ("at_once", "after_a_second"):
                steps = {
                    staleness: run(folder, settings, servers.urls, reward, staleness, arguments)
                    for staleness in (0, 1)
                }
                drawn = folder / f"{reward}_0" / "rollouts"
                judge_s = 1.0 if reward == "after_a_second" else 0.0
                prediction = predicted(steps[0], drawn, judge_s, arguments.prompts)
                values = compared(steps[0], steps[1]) | {"step, predicted": round(prediction, 3)}
                print(json.dumps({"reward": reward, **values}), flush=True)


def run(
    folder: Path,
    settings: dict[str, Any],
    urls: list[str],
    reward: str,
    max_staleness: int,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """The median of each metric of a run's steps."""
    run_dir = folder / f"{reward}_{max_staleness}"
    changes = {
        "run_dir": str(run_dir),
        "policy": settings["policy"] | {"path": str(folder / "base")},
        "data": settings["data"] | {"path": str(folder / "train.jsonl")},
        "steps": arguments.steps,
        "prompts_per_step": arguments.prompts,
        "max_staleness": max_staleness,
        "sampling": {"temperature": 1.0, "max_response_length": arguments.length},
        "rollout": settings["rollout"] | {"urls": urls},
        "rewards": {
            "custom": [{"function": f"{folder / 'rewards.py'}:{reward}"}],
            "max_concurrent": 4096,
            "workers": 1,
        },
        "loss": settings["loss"] | {"tis_clip": 2.0},
    }
    config = folder / "rl.yaml"
    config.write_text(yaml.safe_dump(settings | changes))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "-m", "klear_megatron", "rl", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {name: statistics.median(row[name] for row in rows[WARM_UP:]) for name in rows[-1]}


def predicted(waiting: dict[str, float], drawn: Path, judge_s: float, prompts: int) -> float:
    """Simulated seconds of a step with max_staleness 1.

    Args:
        waiting: seconds of the parts of a step with max_staleness 0.
        drawn: its responses, whose lengths are drawn from.
    """
    rows = [json.loads(line) for file in drawn.iterdir() for line in file.open()]
    lengths = [row["tokens"] for row in rows]
    drawing = waiting["seconds/generate"] + waiting["seconds/reward"]
    scenario = Scenario(
        servers=1,
        leaders=1,
        prompts_per_step=prompts,
        responses_per_prompt=8,
        max_staleness=0,
        draw_length=lambda draw: draw.choice(lengths),
        prompt_tokens=0,
        informative=1 - waiting["groups/dropped"] / waiting["groups/drawn"],
        max_generation_batches=1,
        speed=Speed(STEP_S, SEQUENCE_S, 0, 0),
        capacity=Capacity(256, 40_000),
        leader_token_s=0,
        grade_s=judge_s,
        train_s=lambda lengths: waiting["seconds/total"] - drawing - waiting["seconds/sync"],
        push_s=waiting["seconds/sync"],
    )
    # The server's speed is what makes the simulated step with max_staleness 0 the measured one.
    rest = waiting["seconds/total"] - drawing + judge_s
    slower = (drawing - judge_s) / (simulate(scenario).step_s - rest)
    speed = Speed(STEP_S * slower, SEQUENCE_S * slower, 0, 0)
    return simulate(dataclasses.replace(scenario, max_staleness=1, speed=speed), steps=50).step_s


def compared(waiting: dict[str, float], ahead: dict[str, float]) -> dict[str, float]:
    """The seconds of max_staleness 0 and 1, and their ratios."""
    drawing = waiting["seconds/generate"] + waiting["seconds/reward"]
    training = sum(waiting[f"seconds/{phase}"] for phase in ("log_probs", "train", "sync"))
    step_0, step_1 = waiting["seconds/total"], ahead["seconds/total"]
    values = {
        "generate + grade": drawing,
        "log-probs + train + push": training,
        "step, max_staleness 0": step_0,
        "step, max_staleness 1": step_1,
        "trainer idle, max_staleness 1": ahead["seconds/trainer_idle"],
        "servers idle, max_staleness 1": ahead["seconds/servers_idle"],
        "step over the longer of the two": step_1 / max(drawing, training),
        "speed-up": step_0 / step_1,
    }
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    main()
