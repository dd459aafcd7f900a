"""What docs/metrics.md says of the keys of a metrics.jsonl."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def undocumented(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that the page does not have; a part in capitals stands for any name."""
    names = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    known = [re.compile(re.sub(r"[A-Z]+", r"[^/]+", name)) for name in names]
    keys = {key for row in rows for key in row} - {"step"}
    return sorted(key for key in keys if not any(one.fullmatch(key) for one in known))
