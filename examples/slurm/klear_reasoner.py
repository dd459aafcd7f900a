"""The whole paper as one experiment, from a base model to a folder to publish.

    .venv-launch/bin/python examples/slurm/klear_reasoner.py --site my_site.yaml

Run it from the repository. Each stage is a job, which starts when the one before it has ended well.
Every config is checked before the first job is submitted. `--first STAGE` leaves out the stages
before one, for going on after a mistake.
"""

import argparse
from pathlib import Path
from typing import Any

from klear_megatron.launch.nemo import prepare, submit


def command(runs: Path, name: str, *arguments: str | Path) -> dict[str, Any]:
    """The config of a job for a verb that takes arguments."""
    verb = name.partition("-")[0]
    words = [str(argument) for argument in arguments]
    return {"launch": {"verb": verb, "arguments": words, "run_dir": str(runs / name)}}


def stages(configs: Path, runs: Path) -> dict[str, Path | dict[str, Any]]:
    """The stages by name, in order."""
    ordered: dict[str, Path | dict[str, Any]] = {
        "curate_math": configs / "curate_math.yaml",
        "curate_code": configs / "curate_code.yaml",
    }
    for training in ("sft", "math_rl", "code_rl"):
        ordered[training] = configs / f"{training}.yaml"
        convert = f"convert-{training}"
        ordered[convert] = command(
            runs, convert, runs / training, runs / f"{training}-hf", "--resume"
        )
    ordered["eval"] = configs / "eval.yaml"
    ordered["release"] = command(
        runs, "release", runs / "code_rl", runs / "Klear-Reasoner-8B", "--licence", "apache-2.0"
    )
    return ordered


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, help="YAML file with what the cluster asks for")
    parser.add_argument("--configs", type=Path, default=Path("examples/klear_reasoner_8b"))
    parser.add_argument("--runs", type=Path, default=Path("runs/klear_reasoner_8b"))
    parser.add_argument("--first", metavar="STAGE", default="curate_math")
    arguments = parser.parse_args()
    chosen = stages(arguments.configs, arguments.runs)
    if arguments.first not in chosen:
        parser.error(f"--first: {arguments.first} is none of {', '.join(chosen)}")
    begin = list(chosen).index(arguments.first)
    submit(prepare(*list(chosen.values())[begin:], site=arguments.site), "klear-reasoner")
