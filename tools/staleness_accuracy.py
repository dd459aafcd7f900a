"""Trains the quickstart's model with several values of max_staleness and seeds, and compares them.

    make quickstart
    .venv/bin/python tools/staleness_accuracy.py [--staleness 0 1 2] [--seeds 0 1 2]

Prints a row of a Markdown table for each max_staleness as soon as its seeds are trained: the mean
held-out accuracy at temperature 1.0, with the standard error over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    print("| max_staleness | held-out accuracy | by seed | seconds of a step |\n|---|---|---|---|")
    for max_staleness in arguments.staleness:
        results = [train(max_staleness, seed, arguments) for seed in arguments.seeds]
        accuracies = [accuracy for accuracy, _ in results]
        error = ""
        if len(accuracies) > 1:
            error = f" ± {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.1%}"
        by_seed = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        seconds = statistics.median(seconds for _, seconds in results)
        mean = statistics.mean(accuracies)
        print(f"| {max_staleness} | {mean:.1%}{error} | {by_seed} | {seconds:.2f} |", flush=True)


def train(max_staleness: int, seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """The accuracy after the last step, and the median seconds of a step."""
    run_dir = ROOT / "runs" / "staleness" / f"{max_staleness}_{seed}"
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(row["seconds/total"] for row in rows if row["step"])
    return rows[-1]["eval/heldout/avg"], seconds


if __name__ == "__main__":
    main()
