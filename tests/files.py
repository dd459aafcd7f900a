"""What several tests read from the files of a run."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[str]:
    """With their ends. Unlike str.splitlines, only at newlines, whatever a model has generated."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return list(file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of a JSON Lines file."""
    return [json.loads(line) for line in read_lines(path)]
