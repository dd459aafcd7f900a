"""Rows per second of `curate`, and the memory it needs.

    python tools/benchmark_curate.py [--rows 1000000] [--words 60] [--subset 0]

Synthetic prompts: random words, a tenth of them repeated, a few with nine words in a row of an
evaluation problem. Written to, and removed from, the folder for temporary files.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCES = ["openmath", "numina", "aops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument(
        "--subset", type=int, default=0, help="prompts to select by K-center-greedy"
    )
    parser.add_argument("--folder", type=Path, help="of the data, once it is made")
    options = parser.parse_args()
    if options.folder:
        run(options.folder, options.subset)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "evaluation.jsonl", 1000, options.words, [], seed=1)
        evaluation = [json.loads(line) for line in (folder / "evaluation.jsonl").open()]
        make_rows(folder / "rows.jsonl", options.rows, options.words, evaluation, seed=0)
        size = (folder / "rows.jsonl").stat().st_size
        print(
            f"{options.rows} rows of about {options.words} words, {size / 1e9:.2f} GB", flush=True
        )
        # In a process of its own, whose memory is the program's alone.
        arguments = ["--folder", name, "--subset", str(options.subset)]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


def make_rows(
    path: Path, rows: int, words: int, evaluation: list[dict[str, Any]], seed: int
) -> None:
    rng = random.Random(seed)
    vocabulary = [f"{rng.choice('bcdfghklmnprst')}{rng.choice('aeiou')}{i}" for i in range(20_000)]
    recent: list[str] = []
    with path.open("w") as file:
        for _ in range(rows):
            if recent and rng.random() < 0.1:
                text = rng.choice(recent)
            else:
                text = " ".join(rng.choices(vocabulary, k=words))
                if evaluation and rng.random() < 0.01:
                    problem = rng.choice(evaluation)["prompt"][0]["content"].split()
                    text += " " + " ".join(problem[3:12])
                recent = [*recent[-999:], text]
            row = {
                "data_source": "math_longcot_math_verify",
                "prompt": [{"role": "user", "content": text}],
                "reward_model": {"ground_truth": "4", "style": "rule"},
                "origin": rng.choice(SOURCES),
            }
            file.write(json.dumps(row) + "\n")


def run(folder: Path, subset: int) -> None:
    from klear_megatron.curation import CurateConfig, curate

    config = CurateConfig.model_validate(
        {
            "path": folder / "rows.jsonl",
            "output": folder / "out.jsonl",
            "decontaminate": {"against": [folder / "evaluation.jsonl"]},
            "top_sources": {"count": 2, "field": "origin"},
            "subset": {"size": subset} if subset else None,
        }
    )
    start = time.perf_counter()
    report = curate(config)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{report}\n{report.rows / seconds:.0f} rows per second, {peak:.2f} GB at most")


if __name__ == "__main__":
    main()
