"""How a model was trained: one stage after another, from the base model on.

`training_stages.json` goes with the weights: each checkpoint of a run has it, the converters copy
it, and a run that starts from the model adds its own stage.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "training_stages.json"


@dataclass(frozen=True)
class Stage:
    """One training run, by names that say nothing about its machine."""

    base: str
    """The model that it started from."""
    method: str
    steps: int
    epochs: float | None
    """Rows of the data that were used, over all rows; None where it is not known."""
    data: list[str]
    used: str | None
    """Device hours, and the devices; None where it is not known."""


def read_stages(folder: Path) -> list[Stage]:
    """The stages of the model in a Hugging Face folder or a checkpoint, the first one first; none
    where they are not known."""
    for file in (folder / _FILE, folder / "hf" / _FILE):
        if file.is_file():
            return [Stage(**stage) for stage in json.loads(file.read_text(encoding="utf-8"))]
    return []


def write_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Writes the stages beside a model's weights; nothing if there are none."""
    if stages:
        text = json.dumps([asdict(stage) for stage in stages], indent=2, ensure_ascii=False)
        (folder / _FILE).write_text(text + "\n", encoding="utf-8")


def public_name(path: Path) -> str:
    """The name of a model or a data set without the folders of this machine: `owner/name` of one
    on the hub, also if it lies in the hub's cache."""
    for part in path.parts:
        kind, _, name = part.partition("--")
        if kind in ("models", "datasets") and name:
            return name.replace("--", "/")
    on_hub = len(path.parts) == 2 and not path.is_absolute() and not path.exists()
    return str(path) if on_hub else path.name
