"""What each start of a run used, in usage.jsonl: what the account of the run is made of."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klear_megatron.platform.files import complete_lines

_FILE = "usage.jsonl"


def append_usage(run_dir: Path, **used: Any) -> None:
    """Adds the line of one start, with the time of writing it.

    Args:
        used: see docs/tracking.md.
    """
    row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **used}
    with (run_dir / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_usage(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines in the order of the starts; none of a run of an older version."""
    yield from map(json.loads, complete_lines(run_dir / _FILE))
