"""The config of the run that wrote a checkpoint, which lies in the checkpoint's folder."""

from pathlib import Path
from typing import Any

import yaml

RUN_CONFIG = "config.yaml"


def read_run_config(checkpoint: Path) -> dict[str, Any] | None:
    """The resolved config as plain values; None for a checkpoint that no run of ours wrote."""
    path = checkpoint / RUN_CONFIG
    if not path.is_file():
        return None
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values
