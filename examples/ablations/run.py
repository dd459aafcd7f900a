"""Run the ablations that variants.yaml lists, and draw them.

    OMP_NUM_THREADS=1 python examples/ablations/run.py runs/ablations

All runs start from one SFT checkpoint and share one SGLang server. Each is a command that could be
given by hand, such as `klear-megatron rl examples/ablations/rl.yaml --loss.name cispo`; the first
line of its log has it. Started again, this goes on with the runs that are not finished.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

HERE = Path(__file__).parent


def run(verb: str, config: str, result: Path, changes: Mapping[str, Any]) -> None:
    """`klear-megatron VERB CONFIG`, in a copy of this process, which has imported everything.

    Args:
        result: the file that says that it is done; nothing is run if it is there.
        changes: overrides of the config.
    """
    if result.exists():
        return
    arguments = [verb, str(HERE / config), *overrides(changes)]
    result.parent.mkdir(parents=True, exist_ok=True)
    log = result.with_suffix(".log")
    begin = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, log))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"{result.parent} ended with {child.exitcode}; see {log}")
    print(f"{time.strftime('%X')} {result.parent}: {time.monotonic() - begin:.0f} s", flush=True)


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """The changes as arguments of a command."""
    arguments = []
    for key, value in changes.items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def _run(arguments: list[str], log: Path) -> None:
    """One command, with its output in a file."""
    from klear_megatron.cli import main

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"klear-megatron {shlex.join(arguments)}", flush=True)
    sys.exit(main(arguments))


class Laboratory:
    """All runs of a folder, with the server that they share.

    Args:
        shared: what all runs of a verb change, by the verb.
    """

    def __init__(self, out: Path, url: str, shared: Mapping[str, Mapping[str, Any]]) -> None:
        self.out = out
        self._url = url
        self._shared = shared

    def train(self, verb: str, name: str, seed: int, changes: Mapping[str, Any]) -> Path:
        """A run of `sft` or `rl` from the common checkpoint; returns its folder."""
        folder = self.out / verb / name / f"seed_{seed}"
        given = {"run_dir": str(folder), "seed": seed, "policy.path": str(checkpoint(self.out))}
        if verb == "rl":
            given["rollout.urls"] = [self._url]
            given["data.path"] = str(self.out / "data" / "math.jsonl")
        given |= {**self._shared.get(verb, {}), **changes}
        run(verb, f"{verb}.yaml", folder / "finished.json", given)
        return folder

    def evaluate(self, trained: Path, folder: Path, benchmarks: Mapping[str, Any]) -> None:
        """An evaluation of what an SFT run exported."""
        result = folder / "results.json"
        (model,) = (trained / "hf").iterdir()
        if not result.exists():
            # As if the server had been started with these weights: it is refused otherwise.
            asked = {"model_path": str(model.resolve()), "weight_version": "default"}
            url = f"{self._url}/update_weights_from_disk"
            httpx.post(url, json=asked, timeout=60).raise_for_status()
        given = {"model": str(model), "run_dir": str(folder), "rollout.urls": [self._url]}
        run("eval", "eval.yaml", result, {**given, "benchmarks": benchmarks})


def checkpoint(out: Path) -> Path:
    """What all runs start from."""
    (model,) = (out / "checkpoint" / "hf").iterdir()
    return model


def problems(out: Path, name: str, samples: int = 2) -> dict[str, Any]:
    """A benchmark of the problems in a file."""
    path = str(out / "data" / f"{name}.jsonl")
    return {"path": path, "max_prompt_length": 96, "samples_per_problem": samples}


def filter_programs(laboratory: Laboratory) -> None:
    """Drops the problems that a teacher does not solve, with `curate`: those with wrong tests."""
    out = laboratory.out
    changes = {"data.path": str(out / "data" / "teacher.jsonl")}
    teacher = laboratory.train("sft", "teacher", 0, changes)
    answers = teacher / "evaluation"
    laboratory.evaluate(teacher, answers, {"code": problems(out, "code", samples=2)})
    output = out / "data" / "code_filtered.jsonl"
    given = {
        "path": str(out / "data" / "code.jsonl"),
        "output": str(output),
        "pass_rate.responses": [str(answers / "benchmarks" / "code" / "responses.jsonl")],
    }
    run("curate", "curate.yaml", output, given)


def run_all(out: Path, variants: Mapping[str, Any], laboratory: Laboratory) -> None:
    """The runs of each ablation in turn, with every seed."""
    held_out = {name: problems(out, f"heldout_{name}") for name in ("easy", "hard")}
    for names in variants["ablations"].values():
        for name, seed in itertools.product(names, variants["seeds"]):
            if (changes := variants["rl"].get(name)) is not None:
                if "code_filtered" in changes.get("data.path", ""):
                    filter_programs(laboratory)
                laboratory.train("rl", name, seed, changes)
            else:
                trained = laboratory.train("sft", name, seed, variants["sft"][name])
                laboratory.evaluate(trained, trained / "evaluation", held_out)


def make_data(out: Path, scale: float) -> None:
    command = [sys.executable, str(HERE / "prepare.py"), str(out / "data"), "--scale", str(scale)]
    if not (out / "data" / "base" / "config.json").exists():
        subprocess.run(command, check=True)


def make_checkpoint(out: Path, changes: Mapping[str, Any]) -> None:
    """Trains what all runs start from."""
    given = {
        "run_dir": str(out / "checkpoint"),
        "policy.path": str(out / "data" / "base"),
        "data.path": str(out / "data" / "sft.jsonl"),
        **changes,
    }
    run("sft", "checkpoint.yaml", out / "checkpoint" / "finished.json", given)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=Path, default=HERE / "variants.yaml")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    text = arguments.variants.read_text().replace("{data}", str(out / "data"))
    variants = yaml.safe_load(text)
    shared = variants.get("shared", {})

    # What the runs import, once for all of them. Not at the top of the file: the processes that
    # grade would import it, too.
    warnings.simplefilter("ignore")  # Megatron-Core's about itself
    import plots

    import klear_megatron.evaluation.evaluate
    import klear_megatron.rl.loop
    import klear_megatron.sft.loop  # noqa: F401
    from klear_megatron.config import load_config
    from klear_megatron.rollout import ServeConfig, serving

    make_data(out, variants.get("scale", 1.0))
    make_checkpoint(out, shared.get("checkpoint", {}))
    changes = {"model": str(out / "data" / "base"), **shared.get("serve", {})}
    config = load_config(ServeConfig, HERE / "serve.yaml", overrides(changes))
    with serving(config.rollout, config.model, out / "server", own_weights=True) as servers:
        run_all(out, variants, Laboratory(out, servers.urls[0], shared))
    plots.write(out, variants["ablations"])
    print(f"see {out / 'summary.md'} and the pictures beside it")


if __name__ == "__main__":
    main()
