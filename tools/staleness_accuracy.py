"""Trains the quickstart's model with several values of max_staleness and seeds, and compares them.

    make quickstart
    .venv/bin/python tools/staleness_accuracy.py [--staleness 0 1 2] [--seeds 0 1 2]
        [--run_dir FOLDER] [--section.key value ...]

Prints a row of a Markdown table for each max_staleness as soon as its seeds are trained: the mean
held-out accuracy at temperature 1.0, with the standard error over the seeds, and the mean, median
and 99th percentile of the lengths of the responses that were trained on. The other options are
settings of the run: with `--policy.optimizer.lr 1e-12` the policy stays, so its lengths do, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from klear_megatron.observability import RolloutFiles

ROOT = Path(__file__).parents[1]
EVALUATION = {
    "every": 10**6,  # only after the last step, and before the first
    "benchmarks": {
        "heldout": {
            "path": "runs/quickstart/heldout.jsonl",
            "max_prompt_length": 64,
            "samples_per_problem": 4,
        }
    },
    "sampling": {"temperature": 1.0, "top_p": 1.0, "max_response_length": 64},
}


class Result(NamedTuple):
    """What a run of one seed ended with: its held-out accuracy, the median seconds of a step, and
    the lengths in tokens of the responses that it trained on."""

    accuracy: float
    seconds: float
    lengths: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--run_dir", type=Path, default=ROOT / "runs" / "staleness")
    arguments, overrides = parser.parse_known_args()
    print(
        "| max_staleness | held-out accuracy | by seed | trained lengths: mean, median, 99 % "
        "| seconds of a step |\n|---|---|---|---|---|"
    )
    for max_staleness in arguments.staleness:
        results = [train(max_staleness, seed, arguments, overrides) for seed in arguments.seeds]
        print(row(max_staleness, results), flush=True)


def row(max_staleness: int, results: list[Result]) -> str:
    accuracies = [result.accuracy for result in results]
    error = ""
    if len(accuracies) > 1:
        error = f" ± {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.1%}"
    by_seed = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    lengths = np.concatenate([result.lengths for result in results])
    median, longest = np.percentile(lengths, [50, 99])
    seconds = statistics.median(result.seconds for result in results)
    return (
        f"| {max_staleness} | {statistics.mean(accuracies):.1%}{error} | {by_seed} "
        f"| {lengths.mean():.2f}, {median:.0f}, {longest:.0f} | {seconds:.2f} |"
    )


def train(
    max_staleness: int, seed: int, arguments: argparse.Namespace, overrides: list[str]
) -> Result:
    """Runs one seed to the end."""
    run_dir = arguments.run_dir / f"{max_staleness}_{seed}"
    settings = {
        "run_dir": run_dir,
        "seed": seed,
        "steps": arguments.steps,
        "max_staleness": max_staleness,
        "loss.tis_clip": 2.0,
        "evaluation": json.dumps(EVALUATION),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={arguments.ranks}", "-m", "klear_megatron", "rl"]
    command += [str(ROOT / "examples" / "quickstart" / "rl.yaml")]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command += overrides
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(row["seconds/total"] for row in rows if row["step"])
    rollouts = RolloutFiles(run_dir)
    drawn = (row for step in rollouts.steps() for row in rollouts.read_texts(step))
    lengths = [row["tokens"] for row in drawn if row["advantage"]]
    return Result(rows[-1]["eval/heldout/avg"], seconds, lengths)


if __name__ == "__main__":
    main()
