"""The responses of an evaluation, stored in its run directory as they are drawn."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from klear_megatron.data import Prompt
from klear_megatron.errors import UserError
from klear_megatron.evaluation.config import EvalConfig
from klear_megatron.observability.responses import write_rows

Row = dict[str, Any]
Problems = dict[int, list[Row]]
"""The rows of each problem's samples, by its index, in the order of the indices."""

_RESPONSES, _SETTINGS = "responses.jsonl", "settings.json"


def claim(config: EvalConfig, num_problems: int) -> None:
    """Records in the run directory what its responses are drawn with.

    Raises:
        UserError: it holds responses that were drawn with something else.
    """
    path = config.run_dir / _SETTINGS
    ours = _settings(config, num_problems)
    if not path.exists():
        if (config.run_dir / _RESPONSES).exists():
            raise UserError(
                f"{config.run_dir}: has responses but no {_SETTINGS} that says what they were "
                "drawn with; give another run_dir, or delete it"
            )
        config.run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ours, indent=2) + "\n")
        return
    theirs = json.loads(path.read_text())
    different = [name for name in ours if ours[name] != theirs.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{config.run_dir}: its responses were drawn with another {', '.join(different)} "
            f"({name} was {theirs.get(name)}, is {ours[name]}); give another run_dir, or delete it"
        )


def _settings(config: EvalConfig, num_problems: int) -> Row:
    """All that decides what is drawn; the weights by their files' sizes and times."""
    weights = {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(config.model.glob("*.safetensors"))
    }
    names = {"model", "data", "samples_per_problem", "sampling", "yarn_factor", "seed"}
    settings = config.model_dump(mode="json", include=names)
    return {**settings, "weights": weights, "problems": num_problems}


def read_drawn(run_dir: Path) -> Problems:
    """The problems whose samples are all there; none before the first.

    What a killed run left half-written is not among them.
    """
    samples = _read_settings(run_dir)["samples_per_problem"]
    problems: Problems = {}
    path = run_dir / _RESPONSES
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    row = from_json(line)
                    problems.setdefault(row["index"], []).append(row)
    return {i: rows for i, rows in sorted(problems.items()) if len(rows) == samples}


def read_all(run_dir: Path) -> Problems:
    """The problems of a finished evaluation.

    Raises:
        UserError: it is not finished, or `run_dir` is not an evaluation's.
    """
    problems, wanted = read_drawn(run_dir), _read_settings(run_dir)["problems"]
    if len(problems) < wanted:
        raise UserError(
            f"{run_dir}: has the responses to {len(problems)} of {wanted} problems; run "
            "`klear-megatron eval` again to draw the others"
        )
    return problems


def _read_settings(run_dir: Path) -> Row:
    path = run_dir / _SETTINGS
    if not path.is_file():
        raise UserError(f"{path}: not there; give the run_dir of `klear-megatron eval`")
    settings: Row = json.loads(path.read_text())
    return settings


def check_problems(problems: Problems, prompts: Sequence[Prompt], run_dir: Path) -> None:
    """Raises UserError where the stored responses answer other problems than these."""
    asked = {prompt.index: (prompt.messages, prompt.ground_truth) for prompt in prompts}
    for index, rows in problems.items():
        if any((row["prompt"], row["ground_truth"]) != asked.get(index) for row in rows):
            raise UserError(
                f"{run_dir}: its responses are to other problems, row {index} of the data for one; "
                "the data has changed since. Give another run_dir, or delete it"
            )


def write_problems(run_dir: Path, problems: Mapping[int, Sequence[Row]]) -> None:
    """Replaces what is stored."""
    write_rows(run_dir / _RESPONSES, (row for _, rows in sorted(problems.items()) for row in rows))


def append_rows(run_dir: Path, rows: Sequence[Row]) -> None:
    """Adds the rows of one problem; once this returns, only the whole machine's end loses them."""
    with (run_dir / _RESPONSES).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
