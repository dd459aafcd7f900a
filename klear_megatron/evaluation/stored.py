"""Stores the responses of an evaluation as they are drawn, in a folder per benchmark."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from klear_megatron.config import load_config
from klear_megatron.data import Prompt
from klear_megatron.data.files import stamps
from klear_megatron.errors import UserError
from klear_megatron.evaluation.benchmark import Benchmark
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.evaluation.responses import json_line, write_rows
from klear_megatron.evaluation.scores import Problems, Row, by_problem
from klear_megatron.platform.files import make_folder

RESPONSES, _SETTINGS, _BENCHMARKS = "responses.jsonl", "settings.json", "benchmarks"


def config_path(run_dir: Path) -> Path:
    return run_dir / "config.yaml"


def folder_of(run_dir: Path, benchmark: str) -> Path:
    return run_dir / _BENCHMARKS / benchmark


def stored_config(run_dir: Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """The config of an evaluation, even if its folder was moved.

    Raises:
        UserError: `run_dir` holds no evaluation.
    """
    path = config_path(run_dir)
    # A training run also has a config file.
    if not path.is_file() or not (run_dir / _BENCHMARKS).is_dir():
        raise UserError(
            f"{run_dir}: no evaluation there; give the run_dir of `klear-megatron eval`"
        )
    return load_config(EvalConfig, path, overrides).model_copy(update={"run_dir": run_dir})


def claim(folder: Path, ours: dict[str, Any]) -> None:
    """Records in a folder the settings with which its responses are drawn.

    Raises:
        UserError: the folder holds responses that were drawn with other settings.
    """
    make_folder(folder)
    path, responses = folder / _SETTINGS, folder / RESPONSES
    if not responses.exists() or responses.stat().st_size == 0:
        # As long as nothing has been drawn, the settings may still change.
        path.write_text(json.dumps(ours, indent=2) + "\n")
        return
    if not path.exists():
        raise UserError(
            f"{folder}: has responses but no {_SETTINGS} that says what they were drawn with; "
            "write elsewhere, or delete it"
        )
    theirs = json.loads(path.read_text())
    different = [name for name in ours if ours[name] != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{folder}: its responses were drawn with another {', '.join(different)} "
            f"({name} was {theirs.get(name)}, is {ours[name]}); write elsewhere, or delete it"
        )


def settings_of(config: EvalConfig, benchmark: Benchmark) -> dict[str, Any]:
    """All settings that affect which responses are drawn."""
    return {
        **config.model_dump(
            mode="json", include={"model", "chat_template", "sampling", "yarn", "seed"}
        ),
        **config.benchmarks[benchmark.name].model_dump(mode="json"),
        "weights": stamps(config.model.glob("*.safetensors")),
        "problems": len(benchmark.loaded.prompts),
    }


def read_drawn(run_dir: Path, benchmark: str) -> Problems:
    """The responses drawn so far."""
    return by_problem(stored_rows(folder_of(run_dir, benchmark)))


def stored_rows(folder: Path) -> Iterator[Row]:
    """Streams responses drawn so far, except a last line that a killed run left half-written."""
    path = folder / RESPONSES
    if path.exists():
        with path.open("rb") as file:
            yield from (from_json(line) for line in file if line.endswith(b"\n"))


def read_all(run_dir: Path, benchmark: str) -> Problems:
    """Reads all samples of all problems.

    Raises:
        UserError: some have not been drawn yet.
    """
    problems = read_drawn(run_dir, benchmark)
    path = folder_of(run_dir, benchmark) / _SETTINGS
    settings = json.loads(path.read_text()) if path.exists() else None
    drawn = sum(len(rows) for rows in problems.values())
    if settings is None or drawn < settings["problems"] * settings["samples_per_problem"]:
        raise UserError(
            f"{path.parent}: has {drawn} responses, and more are wanted; run `klear-megatron eval` "
            "again to draw the others"
        )
    return problems


def read_graded(run_dir: Path, benchmark: str) -> Problems:
    """As `read_all`.

    Raises:
        UserError: some samples have not been drawn, or not been graded yet.
    """
    problems = read_all(run_dir, benchmark)
    if any(row["reward"] is None for rows in problems.values() for row in rows):
        raise UserError(f"{run_dir}: its responses are not graded; `klear-megatron regrade` it")
    return problems


def check_problems(folder: Path, problems: Problems, prompts: Sequence[Prompt]) -> None:
    """Checks that the stored responses answer these problems.

    Raises:
        UserError: they answer other problems.
    """
    asked = {prompt.index: (prompt.messages, prompt.ground_truth) for prompt in prompts}
    for index, rows in problems.items():
        if any((row["prompt"], row["ground_truth"]) != asked.get(index) for row in rows):
            raise UserError(
                f"{folder}: its responses are to other problems, row {index} of the data for one; "
                "the data has changed since. Give another run_dir, or delete it"
            )


def write_problems(run_dir: Path, benchmark: str, problems: Mapping[int, Sequence[Row]]) -> None:
    """Replaces the stored problems."""
    path = folder_of(run_dir, benchmark) / RESPONSES
    write_rows(path, chain.from_iterable(problems.values()))


def append_row(folder: Path, row: Row) -> None:
    """Appends a row. Once this returns, only a crash of the whole machine can lose it."""
    with (folder / RESPONSES).open("a", encoding="utf-8") as file:
        file.write(json_line(row))
